// Copies between the host and the device, and within the device.
#include <ATen/ops/_copy_from_and_resize_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "backend.h"

namespace sim {

namespace {

using at::Tensor;

bool is_sim(const Tensor& tensor) { return tensor.device().type() == TYPE; }

bool plain(const Tensor& source, const Tensor& target) {
  return source.scalar_type() == target.scalar_type() && source.sizes() == target.sizes() &&
         source.strides() == target.strides() && source.is_non_overlapping_and_dense();
}

void check_storage(const Tensor& tensor) {
  std::size_t end = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize();
  TORCH_CHECK(end <= tensor.storage().nbytes(), "copy: a tensor of ", tensor.sizes(), " lies outside of its storage, which has ",
              tensor.storage().nbytes(), " bytes: has it been released?");
}

const char* bytes_of(const Tensor& tensor) {
  return static_cast<const char*>(tensor.storage().data()) + tensor.storage_offset() * tensor.itemsize();
}

void copy_bytes(const Tensor& source, const Tensor& target, bool late) {
  check_storage(source);
  check_storage(target);
  auto way = !is_sim(source) ? Machine::Way::Up : is_sim(target) ? Machine::Way::Within : Machine::Way::Down;
  const Tensor& there = is_sim(target) ? target : source;
  Machine& machine = Machine::get();
  machine.copy(machine.current_stream(there.device().index()), way, const_cast<char*>(bytes_of(target)), bytes_of(source),
               target.numel() * target.itemsize(), late);
}

Tensor like(const Tensor& tensor, at::TensorOptions options) {
  if (tensor.is_non_overlapping_and_dense()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::empty(tensor.sizes(), options);
}

// As an operator of the device, which converts and has any strides.
void copy_within(const Tensor& source, const Tensor& target) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_sim_copy", "");
  torch::jit::Stack stack{target, source};
  op.callBoxed(&stack);
}

// Without the bits that say that memory holds conjugates or opposites: of what is read, and of where that goes.
Tensor resolved_bits(const Tensor& tensor) {
  if (tensor.is_conj()) return resolved_bits(tensor.conj()).conj_physical();
  return tensor.is_neg() ? tensor._neg_view().neg() : tensor;
}

Tensor copy_from(const Tensor& given, const Tensor& target, bool non_blocking) {
  if (given.is_conj() || given.is_neg()) return copy_from(resolved_bits(given), target, non_blocking);
  if (target.is_conj() || target.is_neg()) {
    bool conjugate = target.is_conj();
    Tensor there = conjugate ? target.conj() : target._neg_view();
    copy_from(conjugate ? given.to(target.scalar_type()).conj_physical() : given.to(target.scalar_type()).neg(), there,
              non_blocking);
    return target;
  }
  Tensor source = given.sizes() == target.sizes() ? given : given.expand(target.sizes());
  if (target.numel() == 0 || (source.is_alias_of(target) && source.is_same(target))) return target;
  if (is_sim(source) && is_sim(target)) {
    if (source.device() != target.device()) {
      // Each waits for the other, as copies between devices do.
      Machine& machine = Machine::get();
      machine.join_host(machine.current_stream(source.device().index()));
      Tensor dense = source.contiguous();
      Tensor staged = plain(dense, target) ? target : at::empty(dense.sizes(), dense.options().device(target.device()));
      c10::DeviceGuard guard(target.device());
      copy_bytes(dense, staged, false);
      machine.join_host(machine.current_stream(target.device().index()));
      if (!staged.is_same(target)) copy_within(staged, target);
    } else if (non_blocking && plain(source, target)) {
      copy_bytes(source, target, true);
    } else {
      copy_within(source, target);
    }
    return target;
  }
  if (is_sim(target)) {
    // What has to change is changed on the host, then goes up as plain bytes.
    Tensor staged = plain(source, target) ? source : like(target, target.options().device(at::kCPU));
    if (!staged.is_same(source)) staged.copy_(source);
    if (plain(staged, target)) {
      copy_bytes(staged, target, non_blocking);
    } else {
      Tensor whole = like(staged, target.options());
      copy_bytes(staged, whole, non_blocking);
      copy_within(whole, target);
    }
    return target;
  }
  // What has to change is changed on the device, then comes down as plain bytes.
  Tensor staged = plain(source, target) ? source : like(target, source.options().dtype(target.scalar_type()));
  if (!staged.is_same(source)) copy_within(source, staged);
  if (plain(staged, target)) {
    copy_bytes(staged, target, non_blocking);
  } else {
    Tensor whole = like(staged, target.options());
    copy_bytes(staged, whole, false);
    const_cast<Tensor&>(target).copy_(whole);
  }
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

Tensor& copy_on_host(Tensor& target, const Tensor& source) { return target.copy_(source); }

// `copy_` comes here for tensors of the device, so that within the device another operator has to do it.
TORCH_LIBRARY_FRAGMENT(aten, m) { m.def("_sim_copy(Tensor(a!) self, Tensor src) -> Tensor(a!)"); }
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_sim_copy", &copy_on_host); }
// What others would do for such bits is to copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
}

}  // namespace

}  // namespace sim
