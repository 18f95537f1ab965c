// The door between Python and linear attention.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>

#include "door.hpp"
#include "linear_problem.hpp"
#include "pool.hpp"

namespace nb = nanobind;

namespace foveal {

namespace {

using Four = std::tuple<long, long, long, long>;
using Five = std::tuple<long, long, long, long, long>;
using Rows = std::tuple<Address, int, Five>;    // data, type, strides
using Strides4 = std::tuple<Address, Four>;     // data, strides
using Sizes = std::tuple<long, long, long, long, long, long, long, long>;

Operand operand(const Rows& from) {
  Operand x;
  const auto& [data, type, step] = from;
  require(type >= 0 && type <= 2, "the type is float32, bfloat16 or float16");
  x.data = at<void>(data);
  x.type = static_cast<Type>(type);
  std::tie(x.step[0], x.step[1], x.step[2], x.step[3], x.step[4]) = step;
  return x;
}

template <class T>
void read(const Strides4& from, T*& data, long (&step)[4]) {
  data = reinterpret_cast<T*>(std::get<0>(from));
  std::tie(step[0], step[1], step[2], step[3]) = std::get<1>(from);
}

void linear(const Sizes& sizes, const Rows& q, const Rows& k, const Rows& v, const std::optional<Strides4>& q_extra,
            const std::optional<Strides4>& k_extra, const Strides4& start, Address cu, const Strides4& out,
            const std::optional<Strides4>& divisor, Address end, float eps, bool causal, bool reverse, int threads) {
  LinearProblem p;
  std::tie(p.outer, p.heads, p.q_groups, p.k_groups, p.q_len, p.kv_len, p.features, p.channels) = sizes;
  require(p.q_groups == 1 || p.k_groups == 1, "either q has groups, or k and v have");
  require(q_extra.has_value() == k_extra.has_value(), "q and k have one more feature, or neither has");
  require(!causal || p.q_len == p.kv_len, "a causal call has as many rows as keys");
  p.q = operand(q);
  p.k = operand(k);
  p.v = operand(v);
  p.extra = q_extra.has_value();
  if (q_extra) read(*q_extra, p.q_extra, p.q_extra_step);
  if (k_extra) read(*k_extra, p.k_extra, p.k_extra_step);
  read(start, p.start, p.start_step);
  read(out, p.out, p.out_step);
  p.normalise = divisor.has_value();
  if (divisor) read(*divisor, p.divisor, p.divisor_step);
  p.end = reinterpret_cast<float*>(end);
  p.eps = eps;
  p.causal = causal;
  p.reverse = reverse;
  if (cu) {
    p.cu = at<std::int64_t>(cu);
    require(p.q_len == p.kv_len && p.cu[0] == 0 && p.cu[p.outer] == p.q_len, "the sets do not begin at 0 and end with the rows");
    for (long w = 0; w < p.outer; w++) require(p.cu[w] <= p.cu[w + 1], "the bounds of the sets do not rise");
  }
  const Variant& variant = current();
  nb::gil_scoped_release free;
  PoolLock lock;
  variant.linear(p, lock.pool, threads < 1 ? 1 : threads);
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("linear", linear, nb::arg("sizes"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("q_extra").none(), nb::arg("k_extra").none(),
        nb::arg("start"), nb::arg("cu"), nb::arg("out"), nb::arg("divisor").none(), nb::arg("end"), nb::arg("eps"), nb::arg("causal"),
        nb::arg("reverse"), nb::arg("threads"));
}

}  // namespace foveal
