// The two kernels of the norm in which lanes read what others wrote, under a race detector: 70 tensors of one element, 2.
// Linked to kernels/norm.cu and the emulator by test_sanitizers.py. Ends with 0 where the norm is right.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" int zx_launch(const char *entry, unsigned grid, unsigned block, const void *args, size_t bytes, int order,
                         unsigned seed);
extern "C" const char *zx_failure();

struct Segment {
    const void *data;
    int64_t elements, first_chunk, first_piece;
};
struct Chunks {
    const Segment *segments;
    int64_t count, chunks;
    double *chunk_sums;
};
struct Total {
    const Segment *segments;
    int64_t count, pieces;
    double scale;
    const double *piece_sums;
    double *segment_sums, *result;
    int64_t *nonfinite;
};

int main() {
    const int64_t count = 70;
    const std::vector<float> values(count, 2.0f);
    std::vector<Segment> segments;
    for (int64_t at = 0; at < count; at++) {
        segments.push_back({&values[at], 1, at, at});
    }
    for (int order = 0; order < 3; order++) {
        std::vector<double> sums(count), of_segments(count);
        double result[2];
        int64_t nonfinite;
        const Chunks chunks{segments.data(), count, count, sums.data()};
        // A piece is a chunk here, and has its sum.
        const Total total{segments.data(), count, count, 1.0, sums.data(), of_segments.data(), result, &nonfinite};
        if (zx_launch("zx_norm_chunks_f32", 2, 256, &chunks, sizeof chunks, order, 1) != 0 ||
            zx_launch("zx_norm_total", 1, 256, &total, sizeof total, order, 1) != 0) {
            std::puts(zx_failure());
            return 3;
        }
        if (result[0] != 4.0 * count) {
            return 1;
        }
    }
    return 0;
}
