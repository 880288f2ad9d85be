// Parameters that move between the host and the device and stay the same object.
//
// PyTorch lets `parameter.data` change from the host to some kinds of device, CUDA's among them, and not to one that is
// made outside of it. Here the device is one of the former, since programs that are meant for a GPU rely on it.
#include <ATen/core/VariableHooksInterface.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "backend.h"

namespace sim {

namespace {

using at::Tensor;
using at::TensorBase;

bool crosses(const TensorBase& one, const TensorBase& other) {
  auto plain = [](const TensorBase& tensor) { return tensor.device().type() == TYPE || tensor.device().is_cpu(); };
  return one.device().type() != other.device().type() && plain(one) && plain(other) && one.layout() == at::kStrided &&
         other.layout() == at::kStrided;
}

/// PyTorch's own hooks, but for `set_data`.
struct DataHooks final : at::impl::VariableHooksInterface {
  explicit DataHooks(at::impl::VariableHooksInterface* theirs) : theirs(theirs) {}
  at::impl::VariableHooksInterface* theirs;

  void set_data(const TensorBase& self, const TensorBase& data) const override {
    if (!data.defined() || !crosses(self, data)) return theirs->set_data(self, data);
    TORCH_CHECK(!self.requires_grad() || at::isFloatingType(data.scalar_type()) || at::isComplexType(data.scalar_type()),
                "data set to a tensor that requires gradients must be floating point or complex dtype");
    if (auto* meta = torch::autograd::impl::get_autograd_meta(self)) {
      // It would bring gradients to where the parameter was.
      std::lock_guard lock(meta->mutex_);
      meta->grad_accumulator_.reset();
    }
    self.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
  }

  TensorBase tensor_data(const TensorBase& self) const override { return theirs->tensor_data(self); }
  TensorBase variable_data(const TensorBase& self) const override { return theirs->variable_data(self); }
  const c10::intrusive_ptr<torch::autograd::Node>& grad_fn(const TensorBase& self) const override {
    return theirs->grad_fn(self);
  }
  unsigned _register_hook(const TensorBase& self, std::function<TensorBase(const TensorBase&)> hook) const override {
    return theirs->_register_hook(self, std::move(hook));
  }
  void remove_hook(const TensorBase& self, unsigned position) const override { theirs->remove_hook(self, position); }
  bool is_view(const TensorBase& self) const override { return theirs->is_view(self); }
  const TensorBase& base(const TensorBase& self) const override { return theirs->base(self); }
  const std::string& name(const TensorBase& self) const override { return theirs->name(self); }
  bool is_leaf(const TensorBase& self) const override { return theirs->is_leaf(self); }
  int64_t output_nr(const TensorBase& self) const override { return theirs->output_nr(self); }
  TensorBase data(const TensorBase& self) const override { return theirs->data(self); }
  int64_t _version(const TensorBase& self) const override { return theirs->_version(self); }
  void retain_grad(const TensorBase& self) const override { theirs->retain_grad(self); }
  bool retains_grad(const TensorBase& self) const override { return theirs->retains_grad(self); }
  void _backward(const Tensor& self, at::TensorList inputs, const std::optional<Tensor>& gradient,
                 std::optional<bool> keep, bool create) const override {
    theirs->_backward(self, inputs, gradient, keep, create);
  }
  void requires_grad_(const TensorBase& self, bool value) const override { theirs->requires_grad_(self, value); }
  void basic_autograd_not_implemented_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                               torch::jit::Stack* stack) const override {
    theirs->basic_autograd_not_implemented_fallback(op, keys, stack);
  }
  std::optional<c10::ScalarType> grad_dtype(const TensorBase& self) const override { return theirs->grad_dtype(self); }
  void set_grad_dtype(const TensorBase& self, const std::optional<c10::ScalarType>& dtype) const override {
    theirs->set_grad_dtype(self, dtype);
  }
};

[[maybe_unused]] const bool hooked = [] {
  at::impl::SetVariableHooks(new DataHooks(at::impl::GetVariableHooks()));
  return true;
}();

bool compatible(const Tensor& self, const Tensor& from) {
  return crosses(self, from) || self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { m.impl("_has_compatible_shallow_copy_type", &compatible); }
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("_has_compatible_shallow_copy_type", &compatible); }

}  // namespace

}  // namespace sim
