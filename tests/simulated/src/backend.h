// What the two halves of the PyTorch backend share: `backend.cpp` (memory, streams, generators), `operations.cpp`.
#pragma once

#include <ATen/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

#include "machine.h"

namespace sim {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;

/// The device with its index.
c10::Device resolved(c10::Device device);
c10::Allocator* device_allocator();
/// The block under a storage; null where it has no memory.
Block* block_of(const c10::Storage& storage);
void resize_storage(const c10::Storage& storage, std::size_t bytes);
const at::Generator& default_generator(int device);
/// The generator of the host whose numbers this one gives.
at::Generator inner_generator(const at::Generator& generator);

}  // namespace sim
