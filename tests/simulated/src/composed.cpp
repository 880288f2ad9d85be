// Operators that choose by the kind of device, and what autocast does before all of them.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <torch/library.h>

#include "backend.h"

namespace sim {

namespace {

using at::Tensor;

// The host's tensors with these sizes, for an operator that looks at nothing else.
Tensor as_on_host(const Tensor& tensor) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU))
      .requires_grad_(tensor.requires_grad() && at::isFloatingType(tensor.scalar_type()));
}

// Takes the host's own kernel wherever the host would.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                 double dropout, bool causal, std::optional<double> scale, bool grouped) {
  std::optional<Tensor> host_mask;
  if (mask.has_value() && mask->defined()) host_mask = as_on_host(*mask);
  constexpr int64_t FLASH = 1;
  int64_t choice = at::_fused_sdp_choice(as_on_host(query), as_on_host(key), as_on_host(value), host_mask, dropout, causal,
                                         scale, grouped);
  if (choice != FLASH || query.dim() > 4)
    return at::native::scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale, grouped);
  std::optional<Tensor> added = mask;
  if (host_mask.has_value() && mask->scalar_type() == at::kBool)
    added = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), -std::numeric_limits<double>::infinity());
  auto whole = [](const Tensor& tensor) { return tensor.dim() == 3 ? tensor.unsqueeze(0) : tensor; };
  Tensor mixed = std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(whole(query), whole(key), whole(value), dropout,
                                                                             causal, added, scale));
  return query.dim() == 3 ? mixed.squeeze(0) : mixed;
}

enum class Policy { Lower, Full, Promote };

template <Policy POLICY>
at::ScalarType wanted(const c10::ArrayRef<c10::IValue>& arguments) {
  at::ScalarType lower = at::autocast::get_autocast_dtype(TYPE);
  if (POLICY == Policy::Lower) return lower;
  if (POLICY == Policy::Full) return at::kFloat;
  at::ScalarType widest = lower;
  for (const auto& each : arguments)
    if (each.isTensor() && each.toTensor().defined())
      widest = at::autocast::prioritize(widest, each.toTensor(), TYPE);
    else if (each.isTensorList())
      for (const Tensor& tensor : each.toTensorVector()) widest = at::autocast::prioritize(widest, tensor, TYPE);
  return widest;
}

template <Policy POLICY>
void cast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastPrivateUse1);
  std::size_t count = op.schema().arguments().size();
  std::size_t first = stack->size() - count;
  at::ScalarType type = wanted<POLICY>(c10::ArrayRef<c10::IValue>(stack->data() + first, count));
  for (std::size_t i = first; i < stack->size(); i++) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) {
      value = at::autocast::cached_cast(type, value.toTensor(), TYPE);
    } else if (value.isTensorList()) {
      c10::List<Tensor> those;
      for (const Tensor& each : value.toTensorVector()) those.push_back(at::autocast::cached_cast(type, each, TYPE));
      value = those;
    }
  }
  op.callBoxed(stack);
}

// Sums of lower precision are taken, and given, in fp32, unless the program says otherwise.
void typed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastPrivateUse1);
  const auto& arguments = op.schema().arguments();
  const Tensor& first = (*stack)[stack->size() - arguments.size()].toTensor();
  for (std::size_t i = 0; i < arguments.size(); i++) {
    c10::IValue& value = (*stack)[stack->size() - arguments.size() + i];
    if (arguments[i].name() == "dtype" && value.isNone() && at::autocast::is_eligible(first, TYPE))
      value = at::kFloat;
  }
  op.callBoxed(stack);
}

template <Policy POLICY>
torch::CppFunction caster() {
  return torch::CppFunction::makeFromBoxedFunction<&cast<POLICY>>();
}

#define NAME_1(OP) #OP
#define NAME_2(OP, OVERLOAD) #OP "." #OVERLOAD
#define NAME_OF(_1, _2, NAME, ...) NAME
#define NAME(...) NAME_OF(__VA_ARGS__, NAME_2, NAME_1)(__VA_ARGS__)
#define LOWER(...) m.impl(NAME(__VA_ARGS__), caster<Policy::Lower>());
#define FULL(...) m.impl(NAME(__VA_ARGS__), caster<Policy::Full>());
#define TYPED(...) m.impl(NAME(__VA_ARGS__), torch::CppFunction::makeFromBoxedFunction<&typed>());
#define PROMOTE(...) m.impl(NAME(__VA_ARGS__), caster<Policy::Promote>());

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(TYPED)
  AT_FORALL_PROMOTE(PROMOTE)
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("scaled_dot_product_attention", &attention); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { m.impl("scaled_dot_product_attention", &attention); }

}  // namespace

}  // namespace sim
