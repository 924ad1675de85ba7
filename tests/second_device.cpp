// A second device for tests on machines without a GPU, PyTorch's "PrivateUse1": its tensors lie in
// ordinary memory and every operation is the CPU's, but a tensor of the CPU that meets one of its
// own is refused, as CUDA refuses it. So is a generator of the other device.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstdlib>
#include <set>

using at::Tensor;
using c10::IValue;
static const c10::Device SECOND(c10::DeviceType::PrivateUse1, 0);
static const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return SECOND; }
  c10::Device getDevice() const override { return SECOND; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  static void drop(void* p) { free(p); }
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n) TORCH_CHECK(posix_memalign(&p, 64, n) == 0, "no memory");
    return {p, p, &drop, SECOND};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
};
static Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

// A generator that draws what the CPU's draws.
struct Generator final : c10::GeneratorImpl {
  at::Generator twin;
  explicit Generator(at::Generator t) : c10::GeneratorImpl(SECOND, KEYS), twin(std::move(t)) {}
  void set_current_seed(uint64_t s) override { twin.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return twin.current_seed(); }
  uint64_t seed() override { return twin.seed(); }
  void set_state(const c10::TensorImpl& s) override { twin.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return twin.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(twin.clone()); }
};
static at::Generator new_generator() {
  return at::make_generator<Generator>(at::detail::createCPUGenerator());
}
static at::Generator& global_generator() {
  static at::Generator one = new_generator();
  return one;
}
static at::Generator twin_of(const at::Generator& g, const std::string& name) {
  TORCH_CHECK(g.device().is_privateuseone(), "a generator of the CPU in ", name);
  return static_cast<Generator*>(g.unsafeGetGeneratorImpl())->twin;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return global_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto fresh = memory.allocate(n);
    if (s.data()) memcpy(fresh.get(), s.data(), std::min(n, s.nbytes()));
    s.set_data_ptr(std::move(fresh));
    s.set_nbytes(n);
  }
};

// The same memory under the CPU's name.
static Tensor to_cpu(const Tensor& t) {
  if (!t.defined() || !t.is_privateuseone()) return t;
  auto* start = static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.itemsize();
  return at::for_blob(start, t.sizes())
      .strides(t.strides())
      .options(at::TensorOptions().dtype(t.dtype()))
      .target_device(at::kCPU)
      .make_tensor();
}
static Tensor to_second(const Tensor& t) {
  if (!t.defined() || t.is_privateuseone()) return t;
  const Tensor dense = t.is_non_overlapping_and_dense() ? t : t.contiguous();
  Tensor made = at::detail::empty_strided_generic(dense.sizes(), dense.strides(), &memory, KEYS, t.scalar_type());
  to_cpu(made).copy_(t);
  return made;
}
static const Tensor& resize_own(const Tensor& t, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  const size_t need = (c10::multiply_integers(sizes) + t.storage_offset()) * t.itemsize();
  if (need > t.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(t.storage(), need);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return t;
}

static void every_operation(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // CUDA, too, takes indices of the CPU here
  static const std::set<std::string> indexing = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
  const auto& schema = op.schema();
  const std::string name = schema.operator_name().name;
  const size_t count = schema.arguments().size();
  const std::vector<IValue> given = torch::jit::last(*stack, count).vec();
  std::vector<std::pair<Tensor, Tensor>> outputs;  // given, and the CPU's in its place
  std::string stranger;
  bool ours = false;
  auto lend = [&](const Tensor& t) {
    if (t.defined() && t.is_privateuseone()) ours = true;
    else if (t.defined() && t.dim() > 0) stranger = c10::str(t.sizes());
    return to_cpu(t);
  };
  std::vector<IValue> lent;
  for (size_t i = 0; i < count; i++) {
    const auto& argument = schema.arguments()[i];
    const bool writes = argument.alias_info() && argument.alias_info()->isWrite();
    IValue v = given[i];
    if (v.isTensor() && writes && v.toTensor().is_privateuseone() && (argument.kwarg_only() || !v.toTensor().numel())) {
      ours = true;  // the operation may resize it
      outputs.emplace_back(v.toTensor(), at::empty({0}, at::TensorOptions().dtype(v.toTensor().dtype())));
      v = outputs.back().second;
    } else if (v.isTensor()) {
      v = lend(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(lend(t));
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : v.toOptionalTensorList()) list.push_back(t ? std::optional(lend(*t)) : t);
      v = list;
    } else if (v.isDevice()) {
      v = c10::Device(at::kCPU);
    } else if (v.isGenerator()) {
      v = twin_of(v.toGenerator(), name);
    } else if (v.isNone() && argument.type()->str().find("Generator") != std::string::npos) {
      v = twin_of(global_generator(), name);
    }
    lent.push_back(v);
  }
  TORCH_CHECK(!ours || stranger.empty() || indexing.count(name), name, " meets a tensor of the CPU, ", stranger);
  torch::jit::drop(*stack, count);
  for (auto& v : lent) stack->push_back(v);
  op.callBoxed(stack);
  for (auto& [mine, made] : outputs) {
    if (mine.sizes() != made.sizes()) resize_own(mine, made.sizes(), {});
    if (made.numel()) to_cpu(mine).copy_(made);
  }
  const size_t returns = schema.returns().size();
  std::vector<IValue> results = torch::jit::last(*stack, returns).vec();
  torch::jit::drop(*stack, returns);
  for (size_t i = 0; i < returns; i++) {
    IValue v = results[i];
    if (const auto* alias = schema.returns()[i].alias_info(); alias && alias->isWrite()) {
      for (size_t j = 0; j < count; j++) {
        const auto* other = schema.arguments()[j].alias_info();
        if (other && other->isWrite() && other->beforeSets() == alias->beforeSets()) v = given[j];
      }
    } else if (v.isTensor()) {
      v = to_second(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(to_second(t));
      v = list;
    }
    stack->push_back(v);
  }
}

static Tensor convolution(
    const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::IntArrayRef stride, c10::IntArrayRef pad,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef extra, int64_t groups) {
  TORCH_CHECK(w.is_privateuseone() && (!b || !b->defined() || b->is_privateuseone()), "weights of the CPU");
  const auto bias = b ? std::optional(to_cpu(*b)) : b;
  return to_second(at::convolution(to_cpu(x), to_cpu(w), bias, stride, pad, dilation, transposed, extra, groups));
}
static std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& slope, const Tensor& x, const Tensor& w, c10::IntArrayRef stride, c10::IntArrayRef pad,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef extra, int64_t groups, std::array<bool, 3> mask) {
  const int64_t bias[] = {slope.size(1)};
  auto [a, b, c] = at::convolution_backward(
      to_cpu(slope), to_cpu(x), to_cpu(w), c10::IntArrayRef(bias), stride, pad, dilation, transposed, extra, groups, mask);
  return {to_second(a), to_second(b), to_second(c)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", [](c10::IntArrayRef s, std::optional<at::ScalarType> d, std::optional<at::Layout>,
      std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> f) -> Tensor {
    return at::detail::empty_generic(s, &memory, KEYS, c10::dtype_or_default(d), f);
  });
  m.impl("empty_strided", [](c10::IntArrayRef s, c10::IntArrayRef t, std::optional<at::ScalarType> d,
      std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) -> Tensor {
    return at::detail::empty_strided_generic(s, t, &memory, KEYS, c10::dtype_or_default(d));
  });
  m.impl("_copy_from", [](const Tensor& from, const Tensor& to, bool) { to_cpu(to).copy_(to_cpu(from)); return to; });
  m.impl("_local_scalar_dense", [](const Tensor& t) { return at::_local_scalar_dense(to_cpu(t)); });
  m.impl("set_.source_Storage_storage_offset", [](Tensor& t, c10::Storage s, int64_t offset, c10::IntArrayRef sizes,
      c10::IntArrayRef strides) -> Tensor& {
    t.unsafeGetTensorImpl()->set_storage_keep_dtype(s);
    t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
    return t;
  });
  m.impl("resize_", &resize_own);
  m.impl("as_strided", [](const Tensor& t, c10::IntArrayRef s, c10::IntArrayRef u, std::optional<int64_t> o) {
    return at::native::as_strided_tensorimpl(t, s, u, o);
  });
  m.impl("view", [](const Tensor& t, c10::IntArrayRef s) { return at::native::view(t, s); });
  m.impl("_reshape_alias", [](const Tensor& t, c10::IntArrayRef s, c10::IntArrayRef u) {
    return at::native::_reshape_alias(t, s, u);
  });
  m.impl("unfold", [](const Tensor& t, int64_t d, int64_t n, int64_t s) { return at::native::unfold(t, d, n, s); });
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&every_operation>());
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
}
