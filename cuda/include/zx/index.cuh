// Which lane works on what: 64-bit arithmetic throughout, since one tensor may have more than 2^31 elements.
#pragma once

#include "zx/portable.cuh"

namespace zx {

/// The first of `each` items in a row that lane `lane` of block `block` works on.
__device__ inline i64 first_item(u32 block, u32 threads, u32 lane, i64 each) {
    return (static_cast<i64>(block) * threads + lane) * each;
}

/// By how much a lane's items move on when the whole grid has worked on its own.
__device__ inline i64 grid_stride(u32 blocks, u32 threads, i64 each) {
    return static_cast<i64>(blocks) * threads * each;
}

/// The segment that item `item` belongs to: the last of `count` whose `first` is not above it. Segments are in order of
/// their `first`, the first of which is 0; one that has no items shares its `first` with the next and is never found.
template <class Segment>
__device__ inline i64 segment_of(const Segment *segments, i64 count, i64 item, i64 Segment::*first) {
    i64 low = 0, high = count;
    while (high - low > 1) {
        const i64 middle = low + (high - low) / 2;
        if (segments[middle].*first <= item) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace zx
