// Linear attention on several threads. A unit is one key head of one batch row or set. Where there are too few, its rows are cut
// into spans: first every span's own sum, then a running sum over the spans, then all spans at once, each from its state.
#pragma once

#include "linear.hpp"
#include "pool.hpp"

namespace foveal::FOVEAL_VARIANT {

constexpr long LINEAR_SPAN = 4 * LINEAR_CHUNK;  // rows of a span, at least
constexpr long LINEAR_PARTS = 2;                // a span's own sum is made in this many parts

struct LinearPlan {
  const LinearProblem& p;
  int threads;
  long span = 0;                // rows of a span; 0: nothing is cut
  long *first_span, *first_sum;  // (outer + 1): spans, and sums of spans, of all sets before
  long spans = 0, sums = 0, values = 0;
  float* sum_memory = nullptr;  // (sums · heads · parts) states
  char* work_memory = nullptr;
  std::size_t work_bytes = 0;

  LinearPlan(const LinearProblem& p, int threads) : p(p), threads(threads) {
    Carve count{nullptr};
    values = LinearWork(p, count).values;
    work_bytes = (std::size_t)count.at;
    if (threads > 1) span = rows_of_a_span();
  }

  long rows_of(long w) const { return p.cu ? p.cu[w + 1] - p.cu[w] : p.q_len; }
  long keys_of(long w) const { return p.cu ? p.cu[w + 1] - p.cu[w] : p.kv_len; }
  long batch_of(long w) const { return p.cu ? 0 : w; }
  long begin_of(long w) const { return p.cu ? p.cu[w] : 0; }

  long rows_of_a_span() const {
    long longest = 0, total = 0;
    for (long w = 0; w < p.outer; w++) {
      const long n = most(rows_of(w), keys_of(w));
      longest = most(longest, n);
      total += n;
    }
    long parts;
    if (total == longest * p.outer) {
      parts = copies_for(p.outer * p.heads, ceil_div(longest, LINEAR_SPAN), threads);
    } else {  // sets of different sizes: none may take longer than half a thread's share
      const long share = total * p.heads / (2 * threads);
      parts = share < longest ? ceil_div(longest, most(share, LINEAR_SPAN)) : 1;
    }
    return parts < 2 ? 0 : ceil_div(ceil_div(longest, parts), LINEAR_CHUNK) * LINEAR_CHUNK;
  }

  long spans_of(long w) const {
    const long n = most(rows_of(w), keys_of(w));
    return span ? most(1, ceil_div(n, span)) : 1;
  }

  // Rows of part i of `parts` of n rows, whole chunks; some parts may be empty.
  static long edge(long n, long i, long parts) { return least(n, ceil_div(ceil_div(n, LINEAR_CHUNK), parts) * i * LINEAR_CHUNK); }

  void count() {
    for (long w = 0; w < p.outer; w++) {
      first_span[w] = spans;
      first_sum[w] = sums;
      const long n = spans_of(w);
      spans += n;
      sums += n < 2 ? 0 : p.causal ? n - 1 : n;
    }
    first_span[p.outer] = spans;
    first_sum[p.outer] = sums;
  }

  float* sum_at(long index, long h) const { return sum_memory + (index * p.heads + h) * LINEAR_PARTS * values; }
  LinearWork work(int worker) const {
    Carve memory{work_memory + worker * work_bytes};
    return LinearWork(p, memory);
  }

  // Which set item `index` of `first` belongs to.
  long set_of(const long* first, long index) const {
    long low = 0, high = p.outer;
    while (high - low > 1) {
      const long middle = (low + high) / 2;
      first[middle] <= index ? low = middle : high = middle;
    }
    return low;
  }

  // In the order of a reversed call, span 0 is the last one.
  long place(long w, long i) const { return p.reverse ? spans_of(w) - 1 - i : i; }

  void sum_of_part(long task, int worker) const {
    const long part = task % LINEAR_PARTS, h = task / LINEAR_PARTS % p.heads, index = task / LINEAR_PARTS / p.heads;
    const long w = set_of(first_sum, index), n = keys_of(w), at = place(w, index - first_sum[w]);
    const long a = edge(n, at, spans_of(w)), rows = edge(n, at + 1, spans_of(w)) - a;
    LinearWork work = this->work(worker);
    std::memset(work.state, 0, (std::size_t)values * 4);
    work.add_rows(batch_of(w), h, begin_of(w) + a + edge(rows, part, LINEAR_PARTS), begin_of(w) + a + edge(rows, part + 1, LINEAR_PARTS));
    std::memcpy(sum_at(index, h) + part * values, work.state, (std::size_t)values * 4);
  }

  // The sums of a cut unit become the state after each span: causal the one that the next span starts with; else the last counts.
  void run_up(long task, int worker) const {
    const long h = task % p.heads, w = task / p.heads;
    const long count = first_sum[w + 1] - first_sum[w];
    if (!count) return;
    LinearWork work = this->work(worker);
    work.load_state(w, h);
    for (long i = 0; i < count; i++) {
      float* sum = sum_at(first_sum[w] + i, h);
      for (long part = 0; part < LINEAR_PARTS; part++)
        for (long j = 0; j < values; j++) work.state[j] += sum[part * values + j];
      std::memcpy(sum, work.state, (std::size_t)values * 4);
    }
    if (!p.causal) work.store_end(w, h);
  }

  void one_span(long task, int worker) const {
    const long h = task % p.heads, index = task / p.heads;
    const long w = set_of(first_span, index), i = index - first_span[w], parts = spans_of(w), at = place(w, i);
    const long n = rows_of(w), begin = begin_of(w), b = batch_of(w);
    LinearWork work = this->work(worker);
    const long from = p.causal ? i - 1 : parts - 1;
    if (parts > 1 && from >= 0) {
      std::memcpy(work.state, sum_at(first_sum[w] + from, h), (std::size_t)values * 4);
    } else {
      work.load_state(w, h);
    }
    const long first = begin + edge(n, at, parts), last = begin + edge(n, at + 1, parts);
    if (p.causal) {
      work.causal_rows(b, h, first, last);
      if (i == parts - 1) work.store_end(w, h);
      return;
    }
    if (parts == 1) {
      work.add_rows(b, h, begin, begin + keys_of(w));
      work.store_end(w, h);
    }
    work.meet_rows(b, h, first, last);
  }
};

template <void (LinearPlan::*step)(long, int) const>
inline void run_linear(const LinearPlan& plan, Pool& pool, long tasks) {
  pool.run(plan.threads, tasks, [](void* x, long i, int worker) { (static_cast<const LinearPlan*>(x)->*step)(i, worker); },
           const_cast<LinearPlan*>(&plan));
}

inline void linear(const LinearProblem& p, Pool& pool, int threads) {
  if (!p.outer || !p.heads) return;
  const long rows = p.cu ? p.cu[p.outer] : p.outer * most(p.q_len, p.kv_len);
  const double work = (double)rows * p.heads * p.q_groups * p.k_groups * p.features * p.channels * 2;
  if (work / (1 << 19) + 1 < threads) threads = (int)(work / (1 << 19)) + 1;  // as much as waking a helper takes
  LinearPlan plan(p, threads);
  Carve size{nullptr};
  const auto carve = [&](Carve& memory, long sums) {
    plan.first_span = memory.take<long>(p.outer + 1);
    plan.first_sum = memory.take<long>(p.outer + 1);
    plan.work_memory = memory.take<char>((long)plan.work_bytes * threads);
    plan.sum_memory = memory.take<float>(sums * p.heads * LINEAR_PARTS * plan.values);
  };
  long sums = 0;
  for (long w = 0; plan.span && w < p.outer; w++) sums += plan.spans_of(w);  // a bound
  carve(size, plan.span && sums > p.outer ? sums : 0);
  Carve memory{static_cast<char*>(pool.memory((std::size_t)size.at))};
  carve(memory, 0);
  plan.count();
  if (plan.sums) {
    run_linear<&LinearPlan::sum_of_part>(plan, pool, plan.sums * p.heads * LINEAR_PARTS);
    run_linear<&LinearPlan::run_up>(plan, pool, p.outer * p.heads);
  }
  run_linear<&LinearPlan::one_span>(plan, pool, plan.spans * p.heads);
}

}  // namespace foveal::FOVEAL_VARIANT
