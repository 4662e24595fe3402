// How a call is cut into tasks. Depends on the problem's shape alone, never on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "../params.h"

namespace wmha::cpu {

/// What a schedule has to know of an instruction set's kernels.
struct Blocking {
  int64_t query_block;  // queries handled together
  int64_t least_chunk;  // see BackwardSchedule
  int64_t product_rate; // multiplications of the forward pass in the time of one in vector registers, about
};

/// Tasks, handed out in runs of neighbours, each task once. Each thread has an equal share of them in a queue of its
/// own, the same in every call: what it reads is likely to be in its core's caches. When a queue is empty, its thread
/// helps the others.
class TaskQueues {
 public:
  TaskQueues(Range tasks, int64_t run, int64_t threads) : run_(run), size_(std::min(threads, most)) {
    for (int64_t i = 0; i < size_; ++i) {
      queues_[i].next = tasks.begin + tasks.size() * i / size_;
      queues_[i].end = tasks.begin + tasks.size() * (i + 1) / size_;
    }
  }

  /// function(run) until no task is left, on the given one of the threads.
  template <typename Function>
  void for_runs(int64_t thread, const Function& function) {
    for (int64_t i = 0; i < size_; ++i) {
      Queue& queue = queues_[(thread + i) % size_];
      for (Range run = take(queue); run.size() > 0; run = take(queue)) function(run);
    }
  }

 private:
  static constexpr int64_t most = 64; // queues; with more threads, some share one
  struct alignas(64) Queue {          // on a cache line of its own
    std::atomic<int64_t> next;
    int64_t end;
  };

  /// The next run; empty when none is left.
  Range take(Queue& queue) const {
    const int64_t begin = std::min(queue.next.fetch_add(run_, std::memory_order_relaxed), queue.end);
    return {begin, std::min(begin + run_, queue.end)};
  }

  const int64_t run_;
  const int64_t size_;
  std::array<Queue, most> queues_;
};

/// The tasks, as one thread sees them.
class Tasks {
 public:
  Tasks(TaskQueues& queues, int64_t thread) : queues_(queues), thread_(thread) {}

  /// function(run) until no task is left.
  template <typename Function>
  void for_runs(const Function& function) {
    queues_.for_runs(thread_, function);
  }

  /// function(task) until no task is left.
  template <typename Function>
  void for_each(const Function& function) {
    for_runs([&](Range run) {
      for (int64_t task = run.begin; task < run.end; ++task) function(task);
    });
  }

 private:
  TaskQueues& queues_;
  const int64_t thread_;
};

/// One task: a block of queries of one head.
inline int64_t forward_tasks(const AttentionParams& params, const Blocking& blocking) {
  return params.batch * params.heads * ceil_div(params.queries, blocking.query_block);
}

/// Its multiplications, or in vector registers those that take as long, about.
inline int64_t forward_task_size(const AttentionParams& params, const Blocking& blocking) {
  const int64_t queries = std::min(blocking.query_block, params.queries);
  const int64_t products = queries * params.window.most_keys(queries) * (params.key_dim + params.value_dim);
  return products / blocking.product_rate;
}

/// function(batch, head, queries) until no task is left, for up to `most_blocks` neighbouring blocks of a head at a
/// time.
template <typename Function>
void for_blocks(
    const AttentionParams& params,
    Tasks& tasks,
    int64_t block,
    int64_t most_blocks,
    const Function& function) {
  const int64_t tasks_of_head = ceil_div(params.queries, block);
  tasks.for_runs([&](Range run) {
    while (run.size() > 0) {
      const int64_t batch_head = run.begin / tasks_of_head;
      const int64_t first_task = batch_head * tasks_of_head;
      const int64_t end_task = std::min(run.end, first_task + tasks_of_head);
      const int64_t end = std::min((end_task - first_task) * block, params.queries);
      const int64_t step = most_blocks * block;
      for (int64_t first = (run.begin - first_task) * block; first < end; first += step) {
        function(batch_head / params.heads, batch_head % params.heads, Range{first, std::min(first + step, end)});
      }
      run.begin = end_task;
    }
  });
}

/// The forward pass of few queries cuts the keys that they see into splits. Each leaves a state for each query, its
/// softmax's reference and sum and Dv sums of values, in a workspace; merge_decode() makes one of them.
struct DecodeSchedule {
  static constexpr int64_t most_queries = 8;     // beyond, blocks of queries are faster
  static constexpr int64_t wanted_tasks = 64;    // for many cores
  static constexpr int64_t shortest_split = 256; // keys

  int64_t batch_kv_heads;
  int64_t batch_heads;
  int64_t queries;
  int64_t rows;  // queries of the heads that share a key head
  int64_t row;   // Dk + Dv: a key and its value
  int64_t state; // elements of one
  int64_t splits;
  Range keys;   // that at least one query sees
  Range common; // that every query sees; its end may come before its begin

  static bool applies(const AttentionParams& params) {
    return params.kv_heads > 0 && params.queries > 0 && params.queries <= most_queries;
  }

  /// Precondition: applies(params).
  explicit DecodeSchedule(const AttentionParams& params)
      : batch_kv_heads(params.batch * params.kv_heads),
        batch_heads(params.batch * params.heads),
        queries(params.queries),
        rows(params.group() * params.queries),
        row(params.key_dim + params.value_dim),
        state(params.value_dim + 2),
        keys(params.window.keys_of(Range{0, params.queries})),
        common{params.window.keys_of(params.queries - 1).begin, params.window.keys_of(0).end} {
    const int64_t most = ceil_div(keys.size(), shortest_split);
    splits = std::clamp<int64_t>(
        ceil_div(wanted_tasks, std::max<int64_t>(batch_kv_heads, 1)), 1, std::max<int64_t>(most, 1));
  }

  /// One task: one split of one key head.
  int64_t tasks() const { return batch_kv_heads * splits; }
  int64_t task_size() const { return rows * ceil_div(keys.size(), splits) * row; }
  int64_t workspace_size() const { return merge_tasks() * splits * state; }

  /// One task: one query of one head. Where there is one split, there is nothing to merge.
  int64_t merge_tasks() const { return splits > 1 ? batch_heads * queries : 0; }
  int64_t merge_task_size() const { return splits * state; }

  Range keys_of(int64_t split) const {
    return {keys.begin + keys.size() * split / splits, keys.begin + keys.size() * (split + 1) / splits};
  }

  /// The state that a split leaves for a query of head `batch_head` = batch * Hq + head.
  int64_t state_offset(int64_t batch_head, int64_t query, int64_t split) const {
    return ((batch_head * queries + query) * splits + split) * state;
  }
};

/// The backward pass cuts the queries into chunks. A chunk adds up grad_key and grad_value of all keys it sees. Keys
/// near its ends are seen by its neighbours too: each has a share of them, and shares are added in chunk order.
///
///   queries   |-- chunk 0 --|-- chunk 1 --|-- chunk 2 --|
///   keys of 0 [.............:==]
///   keys of 1            [==:...........:==]                  . private: written by the chunk itself
///   keys of 2                         [==:.............]      = shared
///
/// A task is a run of chunks, the longer, the fewer threads there are: where chunk c + 1 follows c in a task, c leaves
/// its shares to it, which adds its own and writes the sums. At a task's ends they go to a workspace, and
/// merge_backward() adds them.
struct BackwardSchedule {
  static constexpr int64_t long_chunk = 1024; // queries
  static constexpr int64_t short_chunk = 480;
  static constexpr int64_t least_tasks = 32;
  static constexpr int64_t wanted_tasks = 64;
  static constexpr int64_t wanted_wide_tasks = 8;
  static constexpr int64_t share_cost = 64; // multiplications in the time that it takes to read one from another core
  static constexpr int64_t tasks_of_thread = 4;
  static constexpr int64_t merge_piece = 128; // keys

  int64_t batch_kv_heads;
  int64_t queries;
  int64_t chunk; // queries
  int64_t chunks;
  int64_t task_chunks;
  int64_t row; // Dk + Dv: the shares of one key
  Window window;
  int64_t most_keys = 0;   // keys of a chunk, at most
  int64_t most_shared = 0; // keys of a task that it shares with others, at most
  int64_t most_left = 0;   // keys of which a chunk leaves shares to the next one of its task, at most

  /// threads: that share the tasks. How many has no bearing on the result.
  BackwardSchedule(const AttentionParams& params, const Blocking& blocking, int64_t threads)
      : batch_kv_heads(params.batch * params.kv_heads),
        queries(params.queries),
        row(params.key_dim + params.value_dim),
        window(params.window) {
    // Long chunks share few keys; but there should be enough for many cores. Where the window is too wide for that, or
    // the sequence too short, there are still a few: memory is a multiple of their number, and below
    // blocking.least_chunk rows to a key (queries of one head, or of all that share it) shares take longer than another
    // core would save.
    const int64_t heads = std::max<int64_t>(batch_kv_heads, 1);
    const int64_t widest = window.most_keys(0); // the query itself left out
    const int64_t window2 = saturating_add(widest, widest);
    const int64_t rows = params.kv_heads > 0 ? params.group() * queries : 0;
    const int64_t wide_chunks = std::clamp<int64_t>(rows / blocking.least_chunk, 1, ceil_div(wanted_wide_tasks, heads));
    const int64_t wide_chunk = ceil_div(queries, wide_chunks);
    chunk = std::max(long_chunk, saturating_add(window2, window2));
    if (ceil_div(queries, chunk) * heads < least_tasks) {
      chunk = std::min(wide_chunk, std::max(short_chunk, window2));
    }
    chunk = std::max(chunk, ceil_div(queries, ceil_div(wanted_tasks, heads)));
    const int64_t blocks = ceil_div(std::clamp<int64_t>(chunk, 1, std::max<int64_t>(queries, 1)), blocking.query_block);
    chunk = blocks * blocking.query_block;
    chunks = ceil_div(queries, chunk);
    bool shared_by_two = true; // at most
    for (int64_t c = 0; c < chunks; ++c) {
      most_keys = std::max(most_keys, keys_of(c).size());
      shared_by_two &= c < 2 || keys_of(c - 2).end <= keys_of(c).begin;
    }
    const int64_t most_tasks = std::max<int64_t>(chunks, 1); // of a head
    const int64_t tasks = shared_by_two ? std::min(ceil_div(tasks_of_thread * threads, heads), most_tasks) : most_tasks;
    task_chunks = ceil_div(most_tasks, tasks);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t after = keys_of(c).end - private_keys_of(c).end;
      if (follows(c + 1)) {
        most_left = std::max(most_left, after);
      } else {
        most_shared = std::max(most_shared, before_task_of(c) + after);
      }
    }
  }

  /// One task: a run of chunks of queries of the heads that share a key head.
  int64_t tasks() const { return batch_kv_heads * tasks_of_head(); }
  int64_t task_size() const { return std::min(chunk, queries) * most_keys * row; }
  int64_t workspace_size() const { return tasks() * most_shared * row; }

  /// function(batch_kv_head, chunk) for the chunks of tasks, until none is left.
  template <typename Function>
  void for_chunks(Tasks& tasks, const Function& function) const {
    tasks.for_each([&](int64_t task) {
      const int64_t begin = task % tasks_of_head() * task_chunks;
      const int64_t end = std::min(begin + task_chunks, chunks);
      for (int64_t c = begin; c < end; ++c) function(task / tasks_of_head(), c);
    });
  }

  /// Does the chunk follow another one in its task?
  bool follows(int64_t c) const { return c < chunks && c % task_chunks > 0; }

  /// One task: a piece of the keys of one key head.
  int64_t merge_tasks() const { return batch_kv_heads * merge_pieces(); }
  int64_t merge_task_size() const {
    return std::min(merge_piece, window.keys) * row * (most_shared > 0 ? share_cost : 1);
  }
  int64_t merge_pieces() const { return ceil_div(window.keys, merge_piece); }
  Range keys_of_piece(int64_t piece) const {
    return {piece * merge_piece, std::min(window.keys, (piece + 1) * merge_piece)};
  }

  Range queries_of(int64_t c) const { return {c * chunk, std::min(queries, (c + 1) * chunk)}; }
  Range keys_of(int64_t c) const { return window.keys_of(queries_of(c)); }

  /// The keys that chunk c sees and no other chunk does.
  Range private_keys_of(int64_t c) const {
    const Range seen = keys_of(c);
    const int64_t begin = c > 0 ? std::max(seen.begin, keys_of(c - 1).end) : seen.begin;
    const int64_t end = c + 1 < chunks ? std::min(seen.end, keys_of(c + 1).begin) : seen.end;
    return {std::min(begin, end), end};
  }

  /// Where in the workspace chunk c of one batch and key head keeps its shares of `key`: Dk of grad_key, then Dv of
  /// grad_value. Precondition: the chunk sees the key and shares it with one of another task.
  int64_t share_offset(int64_t batch_kv_head, int64_t c, int64_t key) const {
    const Range own = private_keys_of(c);
    const int64_t place = key < own.begin ? key - keys_of(c).begin : before_task_of(c) + key - own.end;
    return ((batch_kv_head * tasks_of_head() + c / task_chunks) * most_shared + place) * row;
  }

 private:
  int64_t tasks_of_head() const { return ceil_div(chunks, task_chunks); }

  /// How many keys the task of chunk c shares with those before it.
  int64_t before_task_of(int64_t c) const {
    const int64_t first = c - c % task_chunks;
    return private_keys_of(first).begin - keys_of(first).begin;
  }
};

} // namespace wmha::cpu
