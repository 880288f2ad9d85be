// Operators of the device: those of the host, run on the second mapping of device memory, so that they give its bits.
//
// An operator first lets the current stream come so far, and no other: what other streams still do is seen as it is then.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/enum_tag.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <unordered_map>
#include <unordered_set>

#include "backend.h"

namespace sim {

namespace {

using at::Tensor;

bool is_sim(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == TYPE; }

// The bytes between the first and the last element.
Machine::Touch touch_of(const Tensor& tensor, bool writes) {
  if (tensor.numel() == 0) return {0, 0, writes};
  std::size_t elements = 1;
  for (int64_t i = 0; i < tensor.dim(); i++) elements += (tensor.size(i) - 1) * tensor.stride(i);
  Address low = reinterpret_cast<Address>(tensor.storage().data()) + tensor.storage_offset() * tensor.itemsize();
  return {low, low + elements * tensor.itemsize(), writes};
}

/// The tensors of one call as tensors of the host over the same memory, and back.
class Mapping {
 public:
  explicit Mapping(std::string name) : name_(std::move(name)) {}

  Tensor to_host(const Tensor& tensor, bool writes) {
    if (!is_sim(tensor)) return tensor;
    if (device_ < 0) device_ = tensor.device().index();
    TORCH_CHECK(tensor.device().index() == device_, name_, ": expected all tensors to be on the same device, but found sim:",
                device_, " and sim:", static_cast<int>(tensor.device().index()));
    auto found = tensors_.find(tensor.unsafeGetTensorImpl());
    if (found == tensors_.end()) found = tensors_.emplace(tensor.unsafeGetTensorImpl(), make(tensor)).first;
    touched.push_back(touch_of(tensor, writes));
    if (writes) written_.emplace_back(tensor, found->second);
    return found->second;
  }

  void note_device(int device) { device_ = device; }
  int device() const { return device_; }

  /// What the operator has made of the tensors that it was to write: new sizes, perhaps in memory of its own.
  void take_over_written() {
    for (auto& [ours, theirs] : written_) {
      Storage& storage = storages_.at(ours.storage().unsafeGetStorageImpl());
      if (theirs.storage().data() != storage.alias) {
        resize_storage(ours.storage(), theirs.storage().nbytes());
        storage.alias = nullptr;
        fill(ours.storage(), theirs.storage());
      }
      if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides()) {
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides());
        made.push_back(touch_of(ours, true));
      }
    }
  }

  /// A result: one of the arguments, a view of one, or something new.
  Tensor to_device(const Tensor& theirs) {
    if (!theirs.defined() || theirs.device().type() != c10::DeviceType::CPU) return theirs;
    for (auto& [ours, host] : written_)
      if (host.unsafeGetTensorImpl() == theirs.unsafeGetTensorImpl()) return ours;
    auto* impl = theirs.storage().unsafeGetStorageImpl();
    for (auto& [key, storage] : storages_)
      if (storage.host.unsafeGetStorageImpl() == impl) return shaped(storage.device, theirs);
    auto found = fresh_.find(impl);
    if (found == fresh_.end()) {
      auto memory = at::detail::empty_generic({static_cast<int64_t>(impl->nbytes())}, device_allocator(),
                                              c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), at::kByte, std::nullopt);
      found = fresh_.emplace(impl, memory.storage()).first;
      fill(memory.storage(), theirs.storage());
    }
    Tensor result = shaped(found->second, theirs);
    made.push_back(touch_of(result, true));
    return result;
  }

  std::vector<Machine::Touch> touched, made;

 private:
  struct Storage {
    c10::Storage device, host;
    const void* alias;
  };
  std::string name_;
  int device_ = -1;
  std::unordered_map<c10::TensorImpl*, Tensor> tensors_;
  std::unordered_map<c10::StorageImpl*, Storage> storages_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> fresh_;
  std::vector<std::pair<Tensor, Tensor>> written_;

  // The operator of the host has written into memory that is not the device's: the result moves there.
  static void fill(const c10::Storage& device, const c10::Storage& host) {
    std::size_t bytes = std::min(device.nbytes(), host.nbytes());
    // Where another thread has given the stream something since the operator began, fresh memory is yet to be poisoned.
    Machine::get().current_stream(device.device().index()).drain();
    if (bytes > 0) std::memcpy(Machine::get().alias(device.data()), host.data(), bytes);
  }

  static Tensor shaped(const c10::Storage& storage, const Tensor& like) {
    auto result = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), like.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) result.unsafeGetTensorImpl()->set_wrapped_number(true);
    return result;
  }

  Tensor make(const Tensor& tensor) {
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    Machine::Touch range = touch_of(tensor, false);
    Address end = reinterpret_cast<Address>(impl->data()) + impl->nbytes();
    TORCH_CHECK(range.low == range.high || range.high <= end, name_, ": a tensor of ", tensor.sizes(),
                " lies outside of its storage, which has ", impl->nbytes(), " bytes: has it been released?");
    auto found = storages_.find(impl);
    if (found == storages_.end()) {
      void* alias = impl->nbytes() > 0 ? Machine::get().alias(impl->data()) : nullptr;
      c10::Storage host(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), impl->nbytes(),
                                                              c10::DataPtr(alias, c10::DeviceType::CPU),
                                                              c10::GetAllocator(c10::DeviceType::CPU), true));
      found = storages_.emplace(impl, Storage{tensor.storage(), host, alias}).first;
    }
    auto result = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second.host), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) result.unsafeGetTensorImpl()->set_wrapped_number(true);
    return result;
  }
};

// Operators whose answer the host reads, so that it waits for the stream.
const std::unordered_set<std::string> ANSWERS{
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::_unique",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::is_set_to"};

// Operators that take lengths of the host beside tensors of the device. Indices, which are a list that may have gaps, may
// be of the host for all.
const std::unordered_set<std::string> MIXED{"aten::_pack_padded_sequence", "aten::_pad_packed_sequence"};

template <class Visit>
void each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& each : value.toTensorVector()) visit(each);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<Tensor>& each : value.toOptionalTensorVector())
      if (each.has_value()) visit(*each);
  }
}

void refuse_mixed(const std::string& name, const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> arguments) {
  if (MIXED.contains(name)) return;
  bool device = false, host = false;
  for (const auto& value : arguments) {
    each_tensor(value, [&](const Tensor& tensor) {
      device |= is_sim(tensor);
      host |= tensor.defined() && !is_sim(tensor) && tensor.dim() > 0 && !value.isOptionalTensorList();
    });
  }
  TORCH_CHECK(!(device && host), name,
              ": expected all tensors to be on the same device, but found at least two devices, sim and cpu, in ", schema);
}

// Draws from the generator of the device where the operator has no argument that says from which.
class DefaultGenerator {
 public:
  DefaultGenerator(bool used, int device) : used_(used) {
    if (!used) return;
    auto* theirs = at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl();
    inner_ = inner_generator(default_generator(device));
    kept_ = theirs->get_state();
    theirs->set_state(*inner_.unsafeGetGeneratorImpl()->get_state());
  }
  ~DefaultGenerator() {
    if (!used_) return;
    auto* theirs = at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl();
    inner_.unsafeGetGeneratorImpl()->set_state(*theirs->get_state());
    theirs->set_state(*kept_);
  }

 private:
  bool used_;
  at::Generator inner_;
  c10::intrusive_ptr<c10::TensorImpl> kept_;
};

// Replaces one argument by what the operator of the host takes; whether it is a generator.
bool argument_to_host(Mapping& mapping, const c10::Argument& argument, c10::IValue& value) {
  bool writes = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  if (value.isTensor()) {
    value = mapping.to_host(value.toTensor(), writes);
  } else if (value.isTensorList()) {
    c10::List<Tensor> those;
    for (const Tensor& each : value.toTensorVector()) those.push_back(mapping.to_host(each, writes));
    value = those;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> those;
    for (const std::optional<Tensor>& each : value.toOptionalTensorVector())
      those.push_back(each.has_value() ? std::optional(mapping.to_host(*each, writes)) : std::nullopt);
    value = those;
  } else if (value.isDevice() && value.toDevice().type() == TYPE) {
    mapping.note_device(resolved(value.toDevice()).index());
    value = c10::Device(c10::DeviceType::CPU);
  }
  return argument.name() == "generator";
}

c10::IValue result_to_device(Mapping& mapping, const c10::IValue& value) {
  if (value.isTensor()) return mapping.to_device(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> those;
    for (const Tensor& each : value.toTensorVector()) those.push_back(mapping.to_device(each));
    return those;
  }
  return value;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  std::size_t count = schema.arguments().size();
  refuse_mixed(name, schema, c10::ArrayRef<c10::IValue>(stack->data() + stack->size() - count, count));
  Mapping mapping(name);
  c10::IValue* generator = nullptr;
  for (std::size_t i = 0; i < count; i++) {
    c10::IValue& value = (*stack)[stack->size() - count + i];
    if (argument_to_host(mapping, schema.arguments()[i], value)) generator = &value;
  }
  int index = mapping.device() < 0 ? current_device() : mapping.device();
  c10::DeviceGuard device({TYPE, static_cast<c10::DeviceIndex>(index)});
  if (generator != nullptr)
    *generator = inner_generator(generator->isNone() ? default_generator(index) : generator->toGenerator());
  Machine& machine = Machine::get();
  Stream& stream = machine.current_stream(index);
  Operation operation = machine.begin(stream, name, mapping.touched);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    DefaultGenerator drawn(generator == nullptr && op.hasTag(at::Tag::nondeterministic_seeded), index);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  mapping.take_over_written();
  std::size_t results = schema.returns().size();
  for (std::size_t i = 0; i < results; i++) {
    c10::IValue& value = (*stack)[stack->size() - results + i];
    value = result_to_device(mapping, value);
  }
  if (!mapping.made.empty()) machine.touch(operation, mapping.made);
  if (ANSWERS.contains(name)) machine.join_host(stream);
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<at::Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "sim has strided tensors only");
  TORCH_CHECK(!c10::pinned_memory_or_default(pinned), "only tensors of the host can be pinned");
  c10::DeviceGuard guard(resolved(c10::device_or_default(device)));
  return at::detail::empty_generic(size, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout> layout, std::optional<at::Device> device, std::optional<bool> pinned) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "sim has strided tensors only");
  TORCH_CHECK(!c10::pinned_memory_or_default(pinned), "only tensors of the host can be pinned");
  c10::DeviceGuard guard(resolved(c10::device_or_default(device)));
  return at::detail::empty_strided_generic(size, stride, device_allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

const Tensor& resize(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  std::size_t wanted = at::detail::computeStorageNbytesContiguous(size, self.itemsize(), self.storage_offset());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format.has_value() && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  if (self.numel() > 0 && wanted > self.storage().nbytes()) resize_storage(self.storage(), wanted);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (stride.empty() && !size.empty()) {
    strides.resize(size.size());
    int64_t next = 1;
    for (std::size_t i = size.size(); i-- > 0; next *= std::max<int64_t>(size[i], 1)) strides[i] = next;
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  int64_t size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {size}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  if (self.unsafeGetTensorImpl() == source.unsafeGetTensorImpl()) return self;
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  at::Storage none(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0,
                                                         device_allocator()->allocate(0), device_allocator(), true));
  return set_storage(self, std::move(none), 0, {0}, {});
}

void record_stream(Tensor& self, c10::Stream stream) {
  Block* block = block_of(self.storage());
  Machine& machine = Machine::get();
  if (block != nullptr) machine.use_on(block, machine.stream(stream.device_index(), static_cast<int>(stream.id())));
}

// Native, since they are all about storages and sizes.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("record_stream", &record_stream);
}

// Everything else without a kernel of the host's to prefer: operators that only others than the host have, and of other
// libraries, whenever those come.
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// An operator that has a kernel of the host may also have one that is composed of others, with other bits: where the host
// would take its kernel, so does the device. `convolution` picks by the kind of device, and must see the host.
[[maybe_unused]] const bool preferred = [] {
  auto* library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  const std::unordered_set<std::string> composed{"aten::convolution", "aten::convolution_backward"};
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    auto op = dispatcher.findSchema(name);
    if (!op.has_value() || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    bool picks = composed.contains(name.name) && name.overload_name.empty();
    if (!picks && !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
  return true;
}();

}  // namespace

}  // namespace sim
