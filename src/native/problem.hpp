// What one call consists of: plain pointers and sizes, checked by the door (module.cpp) before any kernel sees them.
#pragma once

#include <cstdint>

namespace foveal {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr long PANEL = 64;  // keys (or rows) that are packed together: the columns of a register tile

struct Strided {  // (batch, heads, length, channels); steps in elements
  const void* data = nullptr;
  long step[4] = {0, 0, 0, 0};
};

// Which pairs are visible: per row an interval of keys, minus padding, minus what tiles hide.
struct Visible {
  const std::int64_t *lo = nullptr, *hi = nullptr;  // (bounds_batch, q_len): row i may see lo[i] <= k < hi[i]
  long bounds_batch = 1;
  const std::uint8_t* valid = nullptr;  // (valid_batch, kv_len), 0 on padding; or null
  long valid_batch = 1;
  const std::int8_t* kinds = nullptr;  // (kinds_batch, kinds_heads, q_tiles, kv_tiles), 0 = dropped; or null: all kept
  long kinds_batch = 1, kinds_heads = 1, q_tiles = 1, kv_tiles = 1, q_tile = 1, kv_tile = 1;
  const std::int32_t* slot = nullptr;  // like kinds with its own batch and heads: row of `table`, −1 = nothing hidden; or null
  long slot_batch = 1, slot_heads = 1;
  const std::uint64_t* table = nullptr;  // (tables, q_tile, words) bits of visible keys inside a tile
  long tables = 0, words = 0;
};

// For each block of query rows a list of key positions, below 0 = none; see KeySelection.
struct Lists {
  const std::int64_t* index = nullptr;  // (batch, heads, blocks, width), or null
  long batch = 1, heads = 1, blocks = 1, width = 0, block_rows = 1;
};

enum class Combine : int { one = 0, softmax = 1, apart = 2 };

// Sets of rows that attend to sets of keys among themselves; see Groups.
struct Groups {
  // Rows and keys of group g are rows[cu_q[g]] … rows[cu_q[g + 1] − 1] and keys[cu_k[g]] … keys[cu_k[g + 1] − 1].
  const std::int64_t *rows = nullptr, *cu_q = nullptr, *keys = nullptr, *cu_k = nullptr;
  const std::int64_t *batch_of = nullptr, *kv_of = nullptr;  // of a group
  long count = 0, members = 0;  // groups; rows in all of them
  bool per_head = false;  // rows are h · q_len + i; otherwise they are i, and every head has the same groups
  // A row in several groups: cannot be (one), is their joint softmax (softmax), or has an output for each (apart).
  Combine combine = Combine::one;
};

struct Problem {
  Type type = Type::f32;
  long batch = 0, heads = 0, kv_heads = 0, q_len = 0, kv_len = 0, dim = 0, dim_v = 0;
  Strided q, k, v;
  float scale = 1.0f, softcap = 0.0f;  // softcap 0: none
  const float* bias = nullptr;         // (heads, 2·reach + 1) or null
  long reach = 0, shift = 0;
  Visible visible;
  Lists lists;
  Groups groups;         // count 0: none
  void* out = nullptr;   // (batch, heads, q_len, dim_v) in the inputs' type; apart: (1 or heads, members, dim_v) in float32
  bool fresh = false;    // out is so large that its memory is new
  float* lse = nullptr;  // (batch, heads, q_len) or (1 or heads, members)
  float* entropy = nullptr;  // of each row's weights, in nats, like lse; or null
};

inline Type type_of_out(const Problem& p) { return p.groups.count && p.groups.combine == Combine::apart ? Type::f32 : p.type; }

struct Gradients {
  Strided dout;                 // like out, in the inputs' type
  const float* dlse = nullptr;  // like lse, or null
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // contiguous, in the inputs' type
  float* dbias = nullptr;  // like bias, or null
};

// Logits (heads, rows, width) that become softmax weights in place; see foveal/kernels/native/rows.py.
struct LogitRows {
  float* x = nullptr;
  const float* q = nullptr;     // (heads, rows, dim), scaled: x holds nothing yet, logits are made here; or null
  const float* keys = nullptr;  // packed by pack_keys; column 0 is key `first`
  long dim = 0, first = 0;
  long heads = 0, rows = 0, width = 0;
  const std::int64_t *lo = nullptr, *hi = nullptr;  // (rows): row i sees the columns lo[i] <= j < hi[i]; the others become 0
  const float* sink = nullptr;                      // (heads) logits of a key without a column, or null
  float hidden = 0.0f;                              // a row whose largest logit is not above this sees nothing
  long own = 0;                                     // column of row 0's own key; it may lie outside the block
  // (heads, rows) each: the largest logit; Σ e^(x − top) and the sink's part; the share of the columns in that; Σ w · (x − top);
  // Σ w · |column − own|
  float *top = nullptr, *total = nullptr, *on_keys = nullptr, *spread = nullptr, *away = nullptr;
  long each = 1;          // rows of a part; a part is one thread's
  float* sums = nullptr;  // (heads, parts, width), zero before: Σ w over the rows of a part
};

struct LinearProblem;
struct Pool;

// One instruction set's kernels.
struct Variant {
  const char* name;
  bool (*usable)();
  void (*forward)(const Problem&, Pool&, int threads);
  void (*backward)(const Problem&, const Gradients&, Pool&, int threads);
  void (*softmax_rows)(const LogitRows&, Pool&, int threads);
  void (*pack_keys)(const float* keys, long count, long dim, float* to, Pool&, int threads);
  void (*linear)(const LinearProblem&, Pool&, int threads);
  double (*peak)(bool pairs, long rounds);
};

}  // namespace foveal
