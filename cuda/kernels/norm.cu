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
/// Words of a chunk that a lane loads together.
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

/// A team of lanes sums a chunk; a lane has the sums of one 4-byte column of its rows. Each tile of whole rows is loaded in
/// words, which pass through shared memory to those whose columns they have; the next tile is under way meanwhile.
template <class E>
struct Chunks {
    using Bits = typename E::Bits;
    /// Sums of a lane.
    static constexpr int COLUMNS = 4 / sizeof(Bits);
    static constexpr u32 TEAM = SUMS / COLUMNS;
    static constexpr u32 TEAMS = NORM_THREADS / TEAM;
    /// Elements of a word.
    static constexpr int WIDE = 16 / sizeof(Bits);
    static constexpr int ROWS = TEAM * WIDE * AT_ONCE / SUMS;
    static constexpr int TILE = ROWS * SUMS;
    static constexpr int TILES = CHUNK / TILE;
    /// 4-byte parts between the tiles of two teams: those of a warp read from banks that are not one another's.
    static constexpr int BETWEEN = ROWS * TEAM + TEAM;
    static_assert(TILES * TILE == CHUNK, "a chunk is whole tiles");

    /// A lane's part of a chunk: nothing where there is no chunk for its team.
    const Bits *data = nullptr;
    int elements = 0;
    u32 *tile;
    u32 part;
    double sums[COLUMNS] = {};

    __device__ void load_tile(Pack<Bits, WIDE> (&packs)[AT_ONCE], int number) const {
#pragma unroll
        for (int next = 0; next < AT_ONCE; next++) {
            load_words(packs[next], global(data) + number * TILE + (next * TEAM + part) * WIDE);
        }
    }

    __device__ void share(const Pack<Bits, WIDE> (&packs)[AT_ONCE]) const {
#pragma unroll
        for (int next = 0; next < AT_ONCE; next++) {
            reinterpret_cast<uint4 *>(tile)[next * TEAM + part] = packs[next].words[0];
        }
    }

    __device__ void add(const Pack<Bits, COLUMNS> &columns) {
#pragma unroll
        for (int at = 0; at < COLUMNS; at++) {
            add_square(sums[at], E::load(columns.at[at]));
        }
    }

    __device__ void add_tile() {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            Pack<Bits, COLUMNS> columns;
            columns.parts[0] = tile[row * TEAM + part];
            add(columns);
        }
    }

    /// Elements from `first` on, a row's part each time. What is not there is zero, which adds nothing.
    __device__ void add_singly(int first) {
#pragma unroll 8
        for (int at = first + part * COLUMNS; at < elements; at += SUMS) {
            Pack<Bits, COLUMNS> columns;
            load_singly(columns, global(data) + at, elements - at);
            add(columns);
        }
    }

    /// All lanes of a warp take the same turns: what one loaded is another's to add.
    __device__ void add_all() {
        const int whole = data != nullptr && is_aligned<Bits, WIDE>(data) ? elements / TILE : 0;
        Pack<Bits, WIDE> packs[AT_ONCE];
        if (whole > 0) {
            load_tile(packs, 0);
        }
        for (int number = 0; number < TILES; number++) {
            if (number < whole) {
                share(packs);
            }
            __syncwarp();
            if (number + 1 < whole) {
                load_tile(packs, number + 1);
            }
            if (number < whole) {
                add_tile();
            }
            __syncwarp();
        }
        add_singly(whole * TILE);
    }

    /// The chunk's sum, for the first lane of its team.
    __device__ double total() {
#pragma unroll
        for (u32 step = TEAM / 2; step > 0; step /= 2) {
#pragma unroll
            for (int at = 0; at < COLUMNS; at++) {
                sums[at] += __shfl_down_sync(ALL_LANES, sums[at], step, TEAM);
            }
        }
        return COLUMNS == 2 ? sums[0] + sums[COLUMNS - 1] : sums[0];
    }
};

template <class E>
__device__ void norm_chunks(const NormChunksArgs &args) {
    using Team = Chunks<E>;
    ZX_SHARED(uint4, words, Team::TEAMS * Team::BETWEEN / 4);
    const u32 team = threadIdx.x / Team::TEAM;
    // All lanes of a warp stay together, since all must be there when sums pass between them.
    for (i64 base = static_cast<i64>(blockIdx.x) * Team::TEAMS; base < args.chunks;
         base += static_cast<i64>(gridDim.x) * Team::TEAMS) {
        const i64 chunk = base + team;
        Team sums;
        sums.tile = reinterpret_cast<u32 *>(words) + team * Team::BETWEEN;
        sums.part = threadIdx.x % Team::TEAM;
        if (chunk < args.chunks) {
            const NormSegment &segment =
                args.segments[segment_of(args.segments, args.count, chunk, &NormSegment::first_chunk)];
            const i64 start = (chunk - segment.first_chunk) * CHUNK;
            sums.data = global(static_cast<const typename E::Bits *>(segment.data)) + start;
            sums.elements = static_cast<int>(least(CHUNK, segment.elements - start));
        }
        sums.add_all();
        const double total = sums.total();
        if (chunk < args.chunks && sums.part == 0) {
            args.chunk_sums[chunk] = total;
        }
    }
}

/// `sum`, and `count` values added to it in order, of which many are loaded before the first is added.
__device__ inline double add_in_order(double sum, const double *values, i64 count) {
    constexpr int HELD = 16;
    for (; count >= HELD; count -= HELD, values += HELD) {
        double held[HELD];
#pragma unroll
        for (int at = 0; at < HELD; at++) {
            held[at] = values[at];
        }
#pragma unroll
        for (int at = 0; at < HELD; at++) {
            sum += held[at];
        }
    }
    for (; count > 0; count--, values++) {
        sum += *values;
    }
    return sum;
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
        args.piece_sums[piece] = add_in_order(0.0, args.chunk_sums + first, last - first);
    }
}

/// One block: a lane a tensor, then one lane for the sum of those.
ZX_KERNEL(zx_norm_total, zx::NormTotalArgs, zx::NORM_THREADS) {
    using namespace zx;
    for (i64 at = threadIdx.x; at < args.count; at += NORM_THREADS) {
        const i64 last = at + 1 < args.count ? args.segments[at + 1].first_piece : args.pieces;
        const i64 first = args.segments[at].first_piece;
        args.segment_sums[at] = add_in_order(0.0, args.piece_sums + first, last - first);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const double sum = add_in_order(0.0, args.segment_sums, args.count);
        args.result[0] = sum;
        args.result[1] = sqrt(sum) * args.scale;
        // Squares of finite fp32 values come to 2^256 at most: only what is not finite gets a sum there.
        *args.nonfinite = !(sum <= 1.7976931348623157e308);
    }
}
