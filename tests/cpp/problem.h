// One attention problem in memory, for tests that call the CPU kernels directly: tensors in any layout, tight around
// what belongs to them, filled with numbers, and the AttentionParams that point at them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <ostream>
#include <random>
#include <vector>

#include "../../csrc/params.h"
#include "reference.h"

namespace testing_wmha {

using wmha::AttentionParams;
using wmha::Range;
using wmha::ScalarType;

// Each kind of kernels says where the memory that it reads and writes comes from.
inline void* allocate(size_t bytes);
inline void release(void* memory);

/// For std::vector.
template <typename T>
struct Allocator {
  using value_type = T;

  T* allocate(size_t elements) {
    void* memory = testing_wmha::allocate(elements * sizeof(T));
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { release(memory); }
  bool operator==(const Allocator&) const { return true; }
};

inline ScalarType acc_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename Function>
auto with_type(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Double: return function(double());
    case ScalarType::Float: return function(float());
    case ScalarType::BFloat16: return function(c10::BFloat16());
    default: return function(c10::Half());
  }
}

/// Where the elements of a (B, H, N, D) tensor lie.
struct Layout {
  int64_t lead = 0;             // elements before the first: an odd number of them misaligns every row
  int64_t gap = 0;              // elements between two rows
  bool positions_first = false; // in memory (B, N, H, D)
  bool expanded = false;        // batches and heads on top of one another, strides 0: inputs only
};

/// A tensor and its memory. All bytes that belong to no element are `blank`: a NaN in every type when read, and seen to
/// have changed when written.
class Tensor {
 public:
  Tensor(ScalarType dtype, int64_t batch, int64_t heads, int64_t positions, int64_t dim, Layout layout = {})
      : batch(layout.expanded ? 1 : batch),
        heads(layout.expanded ? 1 : heads),
        positions(positions),
        dim(dim),
        dtype_(dtype),
        size_(with_type(dtype, [](auto type) { return sizeof(type); })),
        lead_(layout.lead) {
    const int64_t row = dim + layout.gap;
    position_stride_ = layout.positions_first ? heads * row : row;
    head_stride_ = layout.expanded ? 0 : layout.positions_first ? row : positions * row;
    batch_stride_ = layout.expanded ? 0 : heads * positions * row;
    const bool empty = this->batch * this->heads * positions * dim == 0;
    const int64_t last = offset(this->batch - 1, this->heads - 1, positions - 1);
    elements_ = lead_ + (empty ? 0 : last + dim) + tail;
    bytes_.reset(static_cast<unsigned char*>(allocate(elements_ * size_)));
    if (!bytes_) throw std::bad_alloc();
    std::memset(bytes_.get(), blank, elements_ * size_);
  }

  template <typename Pointer>
  wmha::TensorView<Pointer> view() {
    return {bytes_.get() + lead_ * size_, batch_stride_, head_stride_, position_stride_};
  }
  size_t element_size() const { return size_; }
  void* data() { return bytes_.get() + lead_ * size_; }

  double get(int64_t b, int64_t h, int64_t n, int64_t d) const {
    return with_type(dtype_, [&](auto type) {
      return static_cast<double>(reinterpret_cast<const decltype(type)*>(bytes_.get())[lead_ + offset(b, h, n) + d]);
    });
  }
  void set(int64_t b, int64_t h, int64_t n, int64_t d, double x) {
    with_type(dtype_, [&](auto type) {
      reinterpret_cast<decltype(type)*>(bytes_.get())[lead_ + offset(b, h, n) + d] = static_cast<decltype(type)>(x);
    });
  }

  /// function(b, h, n, d) for each element.
  template <typename Function>
  void for_each(const Function& function) const {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t n = 0; n < positions; ++n) {
          for (int64_t d = 0; d < dim; ++d) function(b, h, n, d);
        }
      }
    }
  }

  void fill_random(std::mt19937& random, double magnitude) {
    std::uniform_real_distribution<double> distribution(-magnitude, magnitude);
    for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) { set(b, h, n, d, distribution(random)); });
  }
  void fill(double x) {
    for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) { set(b, h, n, d, x); });
  }

  /// Do all bytes around and between the elements still hold what they were born with?
  bool surroundings_untouched() const {
    std::vector<bool> element(elements_, false);
    for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) { element[lead_ + offset(b, h, n) + d] = true; });
    for (int64_t i = 0; i < elements_; ++i) {
      if (element[i]) continue;
      for (size_t byte = i * size_; byte < (i + 1) * size_; ++byte) {
        if (bytes_.get()[byte] != blank) return false;
      }
    }
    return true;
  }
  bool bitwise_equal(const Tensor& other) const {
    return elements_ == other.elements_ && std::memcmp(bytes_.get(), other.bytes_.get(), elements_ * size_) == 0;
  }
  bool row_bitwise_equal(const Tensor& other, int64_t b, int64_t h, int64_t n) const {
    const int64_t first = (lead_ + offset(b, h, n)) * size_;
    return std::memcmp(bytes_.get() + first, other.bytes_.get() + first, dim * size_) == 0;
  }

  const int64_t batch, heads, positions, dim; // of what is stored: one batch and head if expanded

 private:
  struct Free {
    void operator()(unsigned char* bytes) const { release(bytes); }
  };
  static constexpr int blank = 0xff;
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t tail = 0; // the sanitizer guards the end, against reads too
#else
  static constexpr int64_t tail = 64;
#endif

  int64_t offset(int64_t b, int64_t h, int64_t n) const {
    return b * batch_stride_ + h * head_stride_ + n * position_stride_;
  }

  ScalarType dtype_;
  size_t size_;
  int64_t lead_, batch_stride_, head_stride_, position_stride_;
  int64_t elements_;
  std::unique_ptr<unsigned char, Free> bytes_;
};

/// What a test asks for. `name` shows up when it fails.
struct Case {
  const char* name = "";
  int64_t batch = 1, heads = 2, kv_heads = 2, queries = 50, keys = 70, key_dim = 7, value_dim = 5;
  int64_t left = -1, right = -1;
  std::optional<int64_t> offset = {};
  std::optional<double> scale = {};
  double softcap = 0;
  std::vector<double> temperature = {}; // none: 1; one: a number; one for each head: through a pointer
  bool temperature_pointer = false;     // one number through a pointer with stride 0
  double dropout = 0;
  bool grad_logsumexp = true;
  bool grad_temperature = true;
  Layout layout = {};
  double magnitude = 1; // of query and key
  double shift = 0;     // added to every <q, k>
  double slack = 1;     // factor on the tolerance, for cases that lose digits by their nature
};

inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << c.name << ": B " << c.batch << ", Hq " << c.heads << ", Hkv " << c.kv_heads << ", Nq " << c.queries << ", Nk "
      << c.keys << ", Dk " << c.key_dim << ", Dv " << c.value_dim << ", window (" << c.left << ", " << c.right << ")";
  if (c.offset) out << ", offset " << *c.offset;
  if (c.scale) out << ", scale " << *c.scale;
  if (c.softcap > 0) out << ", softcap " << c.softcap;
  if (c.dropout > 0) out << ", dropout " << c.dropout;
  return out << ", lead " << c.layout.lead << ", gap " << c.layout.gap << ", positions first "
             << c.layout.positions_first << ", expanded " << c.layout.expanded;
}

/// The tensors of a case in one dtype, the inputs filled with random numbers.
class Problem {
 public:
  Problem(ScalarType dtype, const Case& c)
      : acc(acc_type(dtype)),
        query(dtype, c.batch, c.heads, c.queries, c.key_dim, c.layout),
        key(dtype, c.batch, c.kv_heads, c.keys, c.key_dim, c.layout),
        value(dtype, c.batch, c.kv_heads, c.keys, c.value_dim, c.layout),
        grad_output(dtype, c.batch, c.heads, c.queries, c.value_dim, c.layout),
        grad_logsumexp(acc, c.batch, c.heads, c.queries, 1),
        temperature(acc, 1, 1, std::max<int64_t>(c.temperature.size(), 1), 1),
        output(dtype, c.batch, c.heads, c.queries, c.value_dim, writable(c.layout)),
        logsumexp(acc, c.batch, c.heads, c.queries, 1),
        grad_query(dtype, c.batch, c.heads, c.queries, c.key_dim, writable(c.layout)),
        grad_key(dtype, c.batch, c.kv_heads, c.keys, c.key_dim, writable(c.layout)),
        grad_value(dtype, c.batch, c.kv_heads, c.keys, c.value_dim, writable(c.layout)) {
    std::mt19937 random(c.queries + 1000 * c.keys);
    query.fill_random(random, c.magnitude);
    key.fill_random(random, c.magnitude);
    value.fill_random(random, 1);
    grad_output.fill_random(random, 1);
    grad_logsumexp.fill_random(random, 1);
    if (c.shift != 0) {
      const double root = std::exp2(std::floor(std::log2(std::abs(c.shift)) / 2)); // a power of two: exact everywhere
      query.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
        if (d == 0) query.set(b, h, n, 0, root);
      });
      key.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
        if (d == 0) key.set(b, h, n, 0, c.shift / root);
      });
    }
    for (size_t h = 0; h < c.temperature.size(); ++h) temperature.set(0, 0, h, 0, c.temperature[h]);

    params.dtype = dtype;
    params.batch = c.batch;
    params.heads = c.heads;
    params.kv_heads = c.kv_heads;
    params.queries = c.queries;
    params.key_dim = c.key_dim;
    params.value_dim = c.value_dim;
    params.window = {c.left, c.right, c.offset.value_or(c.keys - c.queries), c.keys};
    params.scale = c.scale.value_or(1 / std::sqrt(double(c.key_dim)));
    params.softcap = c.softcap;
    params.temperature = c.temperature.empty() ? 1 : temperature.get(0, 0, 0, 0);
    const bool through_pointer = c.temperature.size() > 1 || c.temperature_pointer;
    params.temperature_data = through_pointer ? temperature.data() : nullptr;
    params.temperature_stride = c.temperature.size() > 1 ? 1 : 0;
    params.dropout = wmha::Dropout::with_probability(c.dropout);
    params.rng_state = params.dropout.enabled() ? rng_state_.data() : nullptr;
    params.query = query.view<const void*>();
    params.key = key.view<const void*>();
    params.value = value.view<const void*>();
    params.output = output.view<void*>();
    params.logsumexp = logsumexp.data();
    params.grad_output = grad_output.view<const void*>();
    params.grad_logsumexp = c.grad_logsumexp ? grad_logsumexp.data() : nullptr;
    params.grad_query = grad_query.view<void*>();
    params.grad_key = grad_key.view<void*>();
    params.grad_value = grad_value.view<void*>();
    has_grad_temperature_ = c.grad_temperature;
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  /// Makes room for so many shares of the temperature's gradient, unless nobody wants it. They are NaN.
  void expect_temperature_shares(int64_t count) {
    if (!has_grad_temperature_) return;
    grad_temperature.assign(count, std::numeric_limits<double>::quiet_NaN());
    params.grad_temperature = grad_temperature.data();
  }

  /// Reads the inputs of a problem with the same sizes, in whatever dtype and layout.
  void copy_inputs(const Problem& other) {
    copy(other.query, query);
    copy(other.key, key);
    copy(other.value, value);
    copy(other.grad_output, grad_output);
    copy(other.grad_logsumexp, grad_logsumexp);
    copy(other.temperature, temperature);
    params.temperature = other.params.temperature;
  }

  std::vector<Tensor*> outputs() { return {&output, &logsumexp, &grad_query, &grad_key, &grad_value}; }

  ScalarType acc;
  Tensor query, key, value, grad_output, grad_logsumexp, temperature;
  Tensor output, logsumexp, grad_query, grad_key, grad_value;
  std::vector<double, Allocator<double>> grad_temperature; // shares of each (batch, head)
  AttentionParams params{};

 private:
  static Layout writable(Layout layout) {
    layout.expanded = false;
    return layout;
  }
  static void copy(const Tensor& from, Tensor& to) {
    to.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
      to.set(b, h, n, d, from.get(std::min(b, from.batch - 1), std::min(h, from.heads - 1), n, d));
    });
  }

  bool has_grad_temperature_;
  std::vector<int64_t, Allocator<int64_t>> rng_state_ = {0x123456789abcdef0, 0}; // seed, offset
};

/// The answer to a problem: the same inputs in fp64, through the reference.
inline std::unique_ptr<Problem> solve(const Problem& problem, Case c) {
  c.layout = {};
  auto solution = std::make_unique<Problem>(ScalarType::Double, c);
  solution->copy_inputs(problem);
  for (Tensor* tensor : {&solution->grad_query, &solution->grad_key, &solution->grad_value}) tensor->fill(0);
  solution->expect_temperature_shares(c.batch * c.heads);
  std::fill(solution->grad_temperature.begin(), solution->grad_temperature.end(), 0.0);
  reference::forward(solution->params);
  reference::backward(solution->params);
  return solution;
}

} // namespace testing_wmha
