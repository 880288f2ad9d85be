// Every kernel of kernels/norm.cu or kernels/cross_entropy.cu, which have all whose lanes read what others wrote, under a
// race detector. Linked to the one that the first argument names, and to the emulator, by test_sanitizers.py. Prints
// the kernels that it ran, and ends with 0 where their results are right.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

extern "C" int zx_launch(const char *entry, unsigned grid, unsigned block, const void *args, size_t bytes, int order,
                         unsigned seed);
extern "C" const char *zx_failure();

namespace {

constexpr unsigned THREADS = 256;

/// A dtype: what entry points call it, and the bits of 1 and of 2 in it.
struct Dtype {
    std::string name;
    size_t size;
    uint32_t one, two;
};
const Dtype DTYPES[] = {
    {"f32", 4, 0x3f800000, 0x40000000}, {"bf16", 2, 0x3f80, 0x4000}, {"f16", 2, 0x3c00, 0x4000}};

/// `count` elements of the same bits, 16 bytes aligned.
struct Elements {
    std::vector<__uint128_t> memory;
    Elements(const Dtype &dtype, size_t count, uint32_t bits) : memory(count * dtype.size / 16 + 1) {
        for (size_t at = 0; at < count; at++) {
            std::memcpy(reinterpret_cast<char *>(memory.data()) + at * dtype.size, &bits, dtype.size);
        }
    }
};

template <class Args>
void launch(const std::string &entry, unsigned grid, const Args &args, int order) {
    if (zx_launch(entry.c_str(), grid, THREADS, &args, sizeof args, order, 1) != 0) {
        std::fprintf(stderr, "%s: %s\n", entry.c_str(), zx_failure());
        std::exit(3);
    }
    std::puts(entry.c_str());
}

void expect(bool right, const std::string &what) {
    if (!right) {
        std::fprintf(stderr, "%s is wrong\n", what.c_str());
        std::exit(1);
    }
}

struct Segment {
    const void *data;
    int64_t elements, first_chunk, first_piece;
};
struct Chunks {
    const Segment *segments;
    int64_t count, chunks;
    double *chunk_sums;
};
struct Pieces {
    const Segment *segments;
    int64_t count, pieces, chunks;
    const double *chunk_sums;
    double *piece_sums;
};
struct Total {
    const Segment *segments;
    int64_t count, pieces;
    double scale;
    const double *piece_sums;
    double *segment_sums, *result;
    int64_t *nonfinite;
};

/// 70 tensors of one element and one with whole tiles, which pass through shared memory; each is one chunk and one piece.
void norm(const Dtype &dtype, int order) {
    constexpr int64_t COUNT = 71, LARGE = 3001;
    const Elements values(dtype, LARGE, dtype.two);
    std::vector<Segment> segments;
    for (int64_t at = 0; at < COUNT; at++) {
        segments.push_back({values.memory.data(), at == 5 ? LARGE : 1, at, at});
    }
    std::vector<double> chunks(COUNT), pieces(COUNT), of_segments(COUNT);
    double result[2];
    int64_t nonfinite;
    launch("zx_norm_chunks_" + dtype.name, 2, Chunks{segments.data(), COUNT, COUNT, chunks.data()}, order);
    launch("zx_norm_pieces", 2, Pieces{segments.data(), COUNT, COUNT, COUNT, chunks.data(), pieces.data()}, order);
    launch("zx_norm_total", 1,
           Total{segments.data(), COUNT, COUNT, 1.0, pieces.data(), of_segments.data(), result, &nonfinite}, order);
    expect(result[0] == 4.0 * (COUNT - 1 + LARGE) && nonfinite == 0, "the norm of " + dtype.name);
}

struct Forward {
    const void *logits;
    const int64_t *targets;
    float *largest, *sum, *target_logit;
    int64_t rows, width, first;
};
struct Backward {
    const void *logits;
    void *gradients;
    const int64_t *targets;
    const float *largest, *sum, *scale;
    int64_t rows, width, first;
};

/// One block has all rows, one after the other.
void cross_entropy(const Dtype &dtype, int order) {
    constexpr int64_t ROWS = 3, WIDTH = 320;
    Elements logits(dtype, ROWS * WIDTH, dtype.one);
    const std::vector<int64_t> targets(ROWS, 0);
    const std::vector<float> scale(ROWS, 1.0f);
    std::vector<float> largest(ROWS, -INFINITY), sum(ROWS), target_logit(ROWS);
    launch("zx_cross_entropy_" + dtype.name, 1,
           Forward{logits.memory.data(), targets.data(), largest.data(), sum.data(), target_logit.data(), ROWS, WIDTH, 0},
           order);
    for (int64_t row = 0; row < ROWS; row++) {
        expect(largest[row] == 1.0f && sum[row] == WIDTH && target_logit[row] == 1.0f, "a row of " + dtype.name);
    }
    launch("zx_cross_entropy_gradient_" + dtype.name, 1,
           Backward{logits.memory.data(), logits.memory.data(), targets.data(), largest.data(), sum.data(), scale.data(),
                    ROWS, WIDTH, 0},
           order);
}

}  // namespace

int main(int, char **arguments) {
    const std::string source = arguments[1];
    for (int order = 0; order < 3; order++) {
        for (const Dtype &dtype : DTYPES) {
            source == "norm" ? norm(dtype, order) : cross_entropy(dtype, order);
        }
    }
}
