// The door between Python and the kernels: turns tensors' addresses into a Problem and checks every index once.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "door.hpp"
#include "pool.hpp"

namespace nb = nanobind;

namespace foveal {

#define FOVEAL_DECLARE(name) namespace name { extern const Variant variant; }
#if defined(FOVEAL_AMX)
FOVEAL_DECLARE(amx)
#endif
#if defined(__x86_64__)
FOVEAL_DECLARE(avx512bf16)
FOVEAL_DECLARE(avx512)
FOVEAL_DECLARE(avx2)
#endif
FOVEAL_DECLARE(baseline)

namespace {

// Best first.
const Variant* const VARIANTS[] = {
#if defined(FOVEAL_AMX)
    &amx::variant,
#endif
#if defined(__x86_64__)
    &avx512bf16::variant, &avx512::variant, &avx2::variant,
#endif
    &baseline::variant};

std::vector<std::string> usable_variants() {
  std::vector<std::string> names;
  for (const Variant* v : VARIANTS)
    if (v->usable()) names.push_back(v->name);
  return names;
}

const Variant& variant_named(const std::string& name) {
  for (const Variant* v : VARIANTS)
    if (v->usable() && (name.empty() || name == v->name)) return *v;
  std::string known;
  for (const std::string& n : usable_variants()) known += (known.empty() ? "" : ", ") + n;
  throw std::invalid_argument("FOVEAL_ISA is '" + name + "'; this machine runs " + known);
}

const Variant* chosen = nullptr;

void choose(const std::string& name) { chosen = &variant_named(name); }

}  // namespace

const Variant& current() {
  if (!chosen) {
    const char* name = std::getenv("FOVEAL_ISA");
    choose(name ? name : "");
  }
  return *chosen;
}

namespace {

using Four = std::tuple<long, long, long, long>;

Strided strided(Address data, const Four& step) {
  return {at<void>(data), {std::get<0>(step), std::get<1>(step), std::get<2>(step), std::get<3>(step)}};
}

// (address, shape…) of the tensors that say what is visible; see foveal/kernels/native/plan.py.
using Bounds = std::tuple<Address, Address, long>;                  // lo, hi, batch
using Valid = std::tuple<Address, long>;                            // valid, batch
using Kinds = std::tuple<Address, long, long, long, long, long, long>;  // kinds, batch, heads, q_tiles, kv_tiles, q_tile, kv_tile
using Slots = std::tuple<Address, long, long, Address, long, long>;     // slot, batch, heads, table, tables, words

Visible visible(const Problem& p, const Bounds& bounds, const std::optional<Valid>& valid, const std::optional<Kinds>& kinds,
                const std::optional<Slots>& slots) {
  Visible v;
  v.lo = at<std::int64_t>(std::get<0>(bounds));
  v.hi = at<std::int64_t>(std::get<1>(bounds));
  v.bounds_batch = std::get<2>(bounds);
  if (valid) {
    v.valid = at<std::uint8_t>(std::get<0>(*valid));
    v.valid_batch = std::get<1>(*valid);
  }
  if (kinds) {
    Address data;
    std::tie(data, v.kinds_batch, v.kinds_heads, v.q_tiles, v.kv_tiles, v.q_tile, v.kv_tile) = *kinds;
    v.kinds = at<std::int8_t>(data);
    require(v.q_tile > 0 && v.kv_tile > 0, "a tile needs at least one row and one key");
    require(v.q_tiles == (p.q_len + v.q_tile - 1) / v.q_tile && v.kv_tiles == (p.kv_len + v.kv_tile - 1) / v.kv_tile,
            "the tiles of the mask do not cover the rows and keys");
  }
  if (slots) {
    Address data, table;
    std::tie(data, v.slot_batch, v.slot_heads, table, v.tables, v.words) = *slots;
    v.slot = at<std::int32_t>(data);
    v.table = at<std::uint64_t>(table);
    require(kinds.has_value() && v.words * 64 >= v.kv_tile, "a table of tiles needs the tiles, and as many bits as a tile has keys");
    const long total = v.slot_batch * v.slot_heads * v.q_tiles * v.kv_tiles;
    for (long i = 0; i < total; i++)
      require(v.slot[i] >= -1 && v.slot[i] < v.tables, "a tile names a row that the table does not have");
  }
  for (long n : {v.bounds_batch, v.valid_batch, v.kinds_batch, v.slot_batch})
    require(n == 1 || n == p.batch, "the mask has another batch size than q");
  for (long n : {v.kinds_heads, v.slot_heads}) require(n == 1 || n == p.heads, "the mask has another number of heads than q");
  return v;
}

using Listed = std::tuple<Address, long, long, long, long, long>;  // index, batch, heads, blocks, width, block_rows

Lists lists(const Problem& p, const Listed& from) {
  Lists l;
  Address index;
  std::tie(index, l.batch, l.heads, l.blocks, l.width, l.block_rows) = from;
  l.index = at<std::int64_t>(index);
  require(l.batch == 1 || l.batch == p.batch, "the lists have another batch size than q");
  require(l.heads == 1 || l.heads == p.kv_heads || l.heads == p.heads, "the lists have neither 1 head nor those of k or q");
  require(l.block_rows > 0 && l.blocks == (p.q_len + l.block_rows - 1) / l.block_rows, "the lists do not cover the rows");
  const long total = l.batch * l.heads * l.blocks * l.width;
  for (long i = 0; i < total; i++) require(l.index[i] < p.kv_len, "a list names a key that does not exist");
  return l;
}

// rows, cu_q, keys, cu_k, batch_of, kv_of, groups, members, keys in all groups, per head, combine
using Grouped = std::tuple<Address, Address, Address, Address, Address, Address, long, long, long, bool, int>;

Groups groups(const Problem& p, const Grouped& from) {
  Groups g;
  Address rows, cu_q, keys, cu_k, batch_of, kv_of;
  long listed;
  int combine;
  std::tie(rows, cu_q, keys, cu_k, batch_of, kv_of, g.count, g.members, listed, g.per_head, combine) = from;
  g.rows = at<std::int64_t>(rows);
  g.cu_q = at<std::int64_t>(cu_q);
  g.keys = at<std::int64_t>(keys);
  g.cu_k = at<std::int64_t>(cu_k);
  g.batch_of = at<std::int64_t>(batch_of);
  g.kv_of = at<std::int64_t>(kv_of);
  require(combine >= 0 && combine <= 2, "groups are combined in one of three ways");
  g.combine = static_cast<Combine>(combine);
  require(g.count > 0 && g.cu_q[0] == 0 && g.cu_k[0] == 0 && g.cu_q[g.count] == g.members && g.cu_k[g.count] == listed,
          "the groups do not begin at 0 and end with their rows and keys");
  const long share = p.heads / p.kv_heads;
  for (long i = 0; i < g.count; i++) {
    require(g.cu_q[i] <= g.cu_q[i + 1] && g.cu_k[i] <= g.cu_k[i + 1], "the bounds of the groups do not rise");
    require(g.batch_of[i] >= 0 && g.batch_of[i] < p.batch && g.kv_of[i] >= 0 && g.kv_of[i] < p.kv_heads, "a group names a head that does not exist");
    const long first = g.per_head ? g.kv_of[i] * share * p.q_len : 0, end = g.per_head ? first + share * p.q_len : p.q_len;
    for (long n = g.cu_q[i]; n < g.cu_q[i + 1]; n++) require(g.rows[n] >= first && g.rows[n] < end, "a group names a row that its head does not have");
  }
  for (long n = 0; n < listed; n++) require(g.keys[n] >= 0 && g.keys[n] < p.kv_len, "a group names a key that does not exist");
  return g;
}

using Sizes = std::tuple<int, long, long, long, long, long, long, long>;
using Tensor4 = std::tuple<Address, Four>;
using Bias = std::tuple<Address, long, long>;  // table, reach, shift

Problem problem(const Sizes& sizes, const Tensor4& q, const Tensor4& k, const Tensor4& v, float scale, float softcap,
                const std::optional<Bias>& bias, const Bounds& bounds, const std::optional<Valid>& valid,
                const std::optional<Kinds>& kinds, const std::optional<Slots>& slots, const std::optional<Listed>& listed,
                const std::optional<Grouped>& grouped) {
  Problem p;
  int type;
  std::tie(type, p.batch, p.heads, p.kv_heads, p.q_len, p.kv_len, p.dim, p.dim_v) = sizes;
  require(type >= 0 && type <= 2, "the type is float32, bfloat16 or float16");
  require(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "query heads are a multiple of key heads");
  p.type = static_cast<Type>(type);
  p.q = strided(std::get<0>(q), std::get<1>(q));
  p.k = strided(std::get<0>(k), std::get<1>(k));
  p.v = strided(std::get<0>(v), std::get<1>(v));
  p.scale = scale;
  p.softcap = softcap;
  if (bias) {
    p.bias = at<float>(std::get<0>(*bias));
    p.reach = std::get<1>(*bias);
    p.shift = std::get<2>(*bias);
  }
  p.visible = visible(p, bounds, valid, kinds, slots);
  if (listed) p.lists = lists(p, *listed);
  if (grouped) p.groups = groups(p, *grouped);
  return p;
}

std::size_t bytes_of(const Problem& p, long numbers_per_batch_row) {
  return (std::size_t)(p.batch * numbers_per_batch_row) * (p.type == Type::f32 ? 4 : 2);
}

void forward(const Sizes& sizes, const Tensor4& q, const Tensor4& k, const Tensor4& v, Address out, Address lse, Address entropy,
             float scale, float softcap, const std::optional<Bias>& bias, const Bounds& bounds, const std::optional<Valid>& valid,
             const std::optional<Kinds>& kinds, const std::optional<Slots>& slots, const std::optional<Listed>& listed,
             const std::optional<Grouped>& grouped, int threads) {
  Problem p = problem(sizes, q, k, v, scale, softcap, bias, bounds, valid, kinds, slots, listed, grouped);
  p.out = reinterpret_cast<void*>(out);
  p.lse = reinterpret_cast<float*>(lse);
  p.entropy = reinterpret_cast<float*>(entropy);
  require(!p.entropy || !p.groups.count || p.groups.combine == Combine::one, "the entropy of a row in several groups is not computed");
  const Variant& variant = current();
  nb::gil_scoped_release free;
  if (p.groups.combine != Combine::apart) p.fresh = prefer_large_pages(p.out, bytes_of(p, p.heads * p.q_len * p.dim_v));
  PoolLock lock;
  variant.forward(p, lock.pool, threads < 1 ? 1 : threads);
}

void backward(const Sizes& sizes, const Tensor4& q, const Tensor4& k, const Tensor4& v, const Tensor4& dout, Address out, Address lse,
              Address dlse, Address dq, Address dk, Address dv, Address dbias, float scale, float softcap, const std::optional<Bias>& bias,
              const Bounds& bounds, const std::optional<Valid>& valid, const std::optional<Kinds>& kinds,
              const std::optional<Slots>& slots, const std::optional<Listed>& listed, const std::optional<Grouped>& grouped, int threads) {
  Problem p = problem(sizes, q, k, v, scale, softcap, bias, bounds, valid, kinds, slots, listed, grouped);
  p.out = reinterpret_cast<void*>(out);
  p.lse = reinterpret_cast<float*>(lse);
  Gradients g;
  g.dout = strided(std::get<0>(dout), std::get<1>(dout));
  g.dlse = at<float>(dlse);
  g.dq = reinterpret_cast<void*>(dq);
  g.dk = reinterpret_cast<void*>(dk);
  g.dv = reinterpret_cast<void*>(dv);
  g.dbias = reinterpret_cast<float*>(dbias);
  const Variant& variant = current();
  nb::gil_scoped_release free;
  prefer_large_pages(g.dq, bytes_of(p, p.heads * p.q_len * p.dim));
  prefer_large_pages(g.dk, bytes_of(p, p.kv_heads * p.kv_len * p.dim));
  prefer_large_pages(g.dv, bytes_of(p, p.kv_heads * p.kv_len * p.dim_v));
  PoolLock lock;
  variant.backward(p, g, lock.pool, threads < 1 ? 1 : threads);
}

// Keys (count, dim), contiguous float32, packed for softmax_rows.
void pack_keys(Address keys, long count, long dim, Address to, int threads) {
  require(count > 0 && dim > 0, "there is at least one key of at least one channel");
  const Variant& variant = current();
  nb::gil_scoped_release free;
  PoolLock lock;
  variant.pack_keys(at<float>(keys), count, dim, reinterpret_cast<float*>(to), lock.pool, threads < 1 ? 1 : threads);
}

// Softmax of rows in place; `facts` is (5, heads, rows): top, total, on_keys, spread, away; `sums` is (heads, parts, width).
void softmax_rows(Address x, Address q, Address keys, long dim, long first, long heads, long rows, long width, Address lo, Address hi,
                  Address sink, float hidden, long own, Address facts, long each, Address sums, int threads) {
  require(heads > 0 && rows > 0 && width > 0 && each > 0, "a block has at least one head, one row and one key, and a part at least one row");
  LogitRows r;
  r.x = reinterpret_cast<float*>(x);
  r.q = at<float>(q);
  r.keys = at<float>(keys);
  r.dim = dim;
  r.first = first;
  r.heads = heads;
  r.rows = rows;
  r.width = width;
  r.lo = at<std::int64_t>(lo);
  r.hi = at<std::int64_t>(hi);
  r.sink = at<float>(sink);
  r.hidden = hidden;
  r.own = own;
  r.each = each;
  r.sums = reinterpret_cast<float*>(sums);
  float* const to = reinterpret_cast<float*>(facts);
  r.top = to;
  r.total = to + heads * rows;
  r.on_keys = to + 2 * heads * rows;
  r.spread = to + 3 * heads * rows;
  r.away = to + 4 * heads * rows;
  const Variant& variant = current();
  nb::gil_scoped_release free;
  PoolLock lock;
  variant.softmax_rows(r, lock.pool, threads < 1 ? 1 : threads);
}

using TileLists = std::tuple<Address, Address, long>;  // counts (outer, lists), tiles (outer, lists, width), width; counts 0: none

// Marks the tiles (outer, rows, tiles) that lists name; false where one names a tile that does not exist.
bool mark(const TileLists& from, long outer, long lists, std::int8_t* kinds, long rows, long tiles, std::int8_t as) {
  const std::int32_t *count = at<std::int32_t>(std::get<0>(from)), *tile = at<std::int32_t>(std::get<1>(from));
  const long width = std::get<2>(from);
  for (long i = 0; count && i < outer * lists; i++) {
    if (count[i] < 0 || count[i] > width) return false;
    for (long j = 0; j < count[i]; j++) {
      const long t = tile[i * width + j];
      if (t < 0 || t >= tiles) return false;
      if (i % lists < rows) kinds[(i / lists * rows + i % lists) * tiles + t] = as;
    }
  }
  return true;
}

// Kinds of a mask's tiles from its lists of partial and of whole ones.
bool tile_kinds(const TileLists& partial, const TileLists& whole, long outer, long lists, long rows, long tiles, Address kinds) {
  std::int8_t* const to = reinterpret_cast<std::int8_t*>(kinds);
  std::memset(to, 0, (std::size_t)(outer * rows * tiles));
  return mark(partial, outer, lists, to, rows, tiles, 1) && mark(whole, outer, lists, to, rows, tiles, 2);
}

// Operations of a bare multiply-add loop on every thread.
double peak(bool pairs, long rounds, int threads) {
  struct Job {
    const Variant& variant;
    bool pairs;
    long rounds;
    double done;
  } job{current(), pairs, rounds, 0.0};
  nb::gil_scoped_release free;
  PoolLock lock;
  lock.pool.run(threads, threads, [](void* x, long i, int) {
    Job& j = *static_cast<Job*>(x);
    const double done = j.variant.peak(j.pairs, j.rounds);
    if (i == 0) j.done = done;
  }, &job);
  return job.done * threads;
}

}  // namespace
}  // namespace foveal

NB_MODULE(_native, m) {
  using namespace foveal;
  m.def("variants", usable_variants, "Instruction sets that this machine runs, best first.");
  m.def("variant", [] { return std::string(current().name); }, "The one in use.");
  m.def("choose", choose, "Use this one from now on; an empty name means the best.");
  m.def("peak", foveal::peak, nb::arg("pairs"), nb::arg("rounds"), nb::arg("threads"));
  m.def("tile_kinds", tile_kinds, nb::arg("partial"), nb::arg("whole"), nb::arg("outer"), nb::arg("lists"), nb::arg("rows"), nb::arg("tiles"),
        nb::arg("kinds"));
  m.def("pack_keys", foveal::pack_keys, nb::arg("keys"), nb::arg("count"), nb::arg("dim"), nb::arg("to"), nb::arg("threads"));
  m.def("softmax_rows", foveal::softmax_rows, nb::arg("x"), nb::arg("q"), nb::arg("keys"), nb::arg("dim"), nb::arg("first"), nb::arg("heads"),
        nb::arg("rows"), nb::arg("width"), nb::arg("lo"), nb::arg("hi"), nb::arg("sink"), nb::arg("hidden"), nb::arg("own"), nb::arg("facts"), nb::arg("each"), nb::arg("sums"), nb::arg("threads"));
  m.def("forward", foveal::forward, nb::arg("sizes"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"), nb::arg("lse"),
        nb::arg("entropy"), nb::arg("scale"), nb::arg("softcap"), nb::arg("bias").none(), nb::arg("bounds"), nb::arg("valid").none(),
        nb::arg("kinds").none(), nb::arg("slots").none(), nb::arg("lists").none(), nb::arg("groups").none(), nb::arg("threads"));
  m.def("backward", foveal::backward, nb::arg("sizes"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("dout"), nb::arg("out"),
        nb::arg("lse"), nb::arg("dlse"), nb::arg("dq"), nb::arg("dk"), nb::arg("dv"), nb::arg("dbias"), nb::arg("scale"), nb::arg("softcap"),
        nb::arg("bias").none(), nb::arg("bounds"), nb::arg("valid").none(), nb::arg("kinds").none(), nb::arg("slots").none(),
        nb::arg("lists").none(), nb::arg("groups").none(), nb::arg("threads"));
  bind_linear(m);
}
