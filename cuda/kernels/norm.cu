// The norm of many tensors, with the bits of the core's (zeroxide-optim's accumulate.rs, zeroxide-offload's
// gradients/accumulate.rs), which fix the order of its sums:
//   a chunk, 4096 elements from the start of a tensor on: 16 partial sums in double precision, element i added to sum
//   i % 16 in order of i; then the upper half of the sums is added to the lower until one is left;
//   a piece, 64 chunks: their sums added in order; a tensor: its pieces in order; the whole: its tensors in order.
// The grid decides who computes a sum and never what is summed.
#include "zx/convert.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 NORM_THREADS = 256;
constexpr i64 CHUNK = 4096;
constexpr int SUMS = 16;
constexpr i64 PIECE_CHUNKS = 64;
/// Rows of a chunk that a lane loads together.
constexpr int AT_ONCE = 4;

struct NormSegment {
    const void *data;
    i64 elements;
    i64 first_chunk;
    i64 first_piece;
};

struct NormChunksArgs {
    const NormSegment *segments;
    i64 count;
    i64 chunks;
    double *chunk_sums;
};

struct NormPiecesArgs {
    const NormSegment *segments;
    i64 count;
    i64 pieces;
    i64 chunks;
    const double *chunk_sums;
    double *piece_sums;
};

struct NormTotalArgs {
    const NormSegment *segments;
    i64 count;
    i64 pieces;
    double scale;
    const double *piece_sums;
    double *segment_sums;
    double *result;
    i64 *nonfinite;
};

/// The square is exact in double precision: 24 bits by 24. One rounding is left, that of the sum.
__device__ inline void add_square(double &sum, float value) {
    const double wide = value;
    sum = fma(wide, wide, sum);
}

/// What is not there was loaded as zero, which adds nothing.
template <class E, int EACH>
__device__ inline void add_squares(double (&sums)[EACH], const Pack<typename E::Bits, EACH> &pack) {
#pragma unroll
    for (int at = 0; at < EACH; at++) {
        add_square(sums[at], E::load(pack.at[at]));
    }
}

/// A team of lanes sums a chunk; each has as many of its 16 sums as elements come with one load.
template <class E>
__device__ void norm_chunks(const NormChunksArgs &args) {
    using Bits = typename E::Bits;
    constexpr int EACH = 16 / sizeof(Bits);
    constexpr u32 TEAM = SUMS / EACH;
    constexpr i64 TEAMS = NORM_THREADS / TEAM;
    const u32 part = threadIdx.x % TEAM;
    // All lanes of a warp take the same turns, since all must be there when sums pass between them.
    for (i64 base = blockIdx.x * TEAMS; base < args.chunks; base += gridDim.x * TEAMS) {
        const i64 chunk = base + threadIdx.x / TEAM;
        double sums[EACH] = {};
        if (chunk < args.chunks) {
            const NormSegment &segment =
                args.segments[segment_of(args.segments, args.count, chunk, &NormSegment::first_chunk)];
            const i64 start = (chunk - segment.first_chunk) * CHUNK;
            const i64 elements = least(CHUNK, segment.elements - start);
            const Bits *data = global(static_cast<const Bits *>(segment.data)) + start + part * EACH;
            const bool aligned = is_aligned<Bits, EACH>(data);
            int row = 0;
            // Several loads are under way before the first of them is waited for.
            if (aligned) {
                const int whole = static_cast<int>(elements / (SUMS * AT_ONCE)) * AT_ONCE;
                for (; row < whole; row += AT_ONCE) {
                    Pack<Bits, EACH> packs[AT_ONCE];
#pragma unroll
                    for (int next = 0; next < AT_ONCE; next++) {
                        load_words(packs[next], data + (row + next) * SUMS);
                    }
#pragma unroll
                    for (int next = 0; next < AT_ONCE; next++) {
                        add_squares<E>(sums, packs[next]);
                    }
                }
            }
            for (; row * SUMS < elements; row++) {
                Pack<Bits, EACH> pack;
                load_singly(pack, data + row * SUMS, elements - part * EACH - row * SUMS);
                add_squares<E>(sums, pack);
            }
        }
#pragma unroll
        for (u32 step = TEAM / 2; step > 0; step /= 2) {
#pragma unroll
            for (int at = 0; at < EACH; at++) {
                sums[at] += __shfl_down_sync(ALL_LANES, sums[at], step, TEAM);
            }
        }
#pragma unroll
        for (int width = EACH / 2; width > 0; width /= 2) {
#pragma unroll
            for (int at = 0; at < width; at++) {
                sums[at] += sums[at + width];
            }
        }
        if (chunk < args.chunks && part == 0) {
            args.chunk_sums[chunk] = sums[0];
        }
    }
}

}  // namespace zx

ZX_KERNEL(zx_norm_chunks_f32, zx::NormChunksArgs, zx::NORM_THREADS) { zx::norm_chunks<zx::F32>(args); }
ZX_KERNEL(zx_norm_chunks_bf16, zx::NormChunksArgs, zx::NORM_THREADS) { zx::norm_chunks<zx::Bf16>(args); }
ZX_KERNEL(zx_norm_chunks_f16, zx::NormChunksArgs, zx::NORM_THREADS) { zx::norm_chunks<zx::F16>(args); }

/// One lane a piece.
ZX_KERNEL(zx_norm_pieces, zx::NormPiecesArgs, zx::NORM_THREADS) {
    using namespace zx;
    const i64 stride = grid_stride(gridDim.x, NORM_THREADS, 1);
    for (i64 piece = first_item(blockIdx.x, NORM_THREADS, threadIdx.x, 1); piece < args.pieces; piece += stride) {
        const i64 at = segment_of(args.segments, args.count, piece, &NormSegment::first_piece);
        const NormSegment &segment = args.segments[at];
        const i64 end = at + 1 < args.count ? args.segments[at + 1].first_chunk : args.chunks;
        const i64 first = segment.first_chunk + (piece - segment.first_piece) * PIECE_CHUNKS;
        const i64 last = least(end, first + PIECE_CHUNKS);
        double sum = 0.0;
        for (i64 chunk = first; chunk < last; chunk++) {
            sum += args.chunk_sums[chunk];
        }
        args.piece_sums[piece] = sum;
    }
}

/// One block: a lane a tensor, then one lane for the sum of those.
ZX_KERNEL(zx_norm_total, zx::NormTotalArgs, zx::NORM_THREADS) {
    using namespace zx;
    for (i64 at = threadIdx.x; at < args.count; at += NORM_THREADS) {
        const i64 last = at + 1 < args.count ? args.segments[at + 1].first_piece : args.pieces;
        double sum = 0.0;
        for (i64 piece = args.segments[at].first_piece; piece < last; piece++) {
            sum += args.piece_sums[piece];
        }
        args.segment_sums[at] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0.0;
        for (i64 at = 0; at < args.count; at++) {
            sum += args.segment_sums[at];
        }
        args.result[0] = sum;
        args.result[1] = sqrt(sum) * args.scale;
        // Squares of finite fp32 values come to 2^256 at most: only what is not finite gets a sum there.
        *args.nonfinite = !(sum <= 1.7976931348623157e308);
    }
}
