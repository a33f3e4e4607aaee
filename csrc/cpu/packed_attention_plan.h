// What a pack means for packed attention on the CPU: comparisons that share no key, and their
// blocks of keys.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

namespace rmega {
namespace attention {

constexpr int64_t kQueries = 96;  // most rows of a query block
constexpr int64_t kKeys = 128;    // most rows of a key block

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of a block when n rows are cut evenly into blocks of at most `most`: no short block is left
// at the end.
inline int64_t even_block(int64_t n, int64_t most) {
  const int64_t count = (n + most - 1) / most;
  return std::min(most, round_up((n + count - 1) / count, 32));
}

// A run of key rows: a prefix or a segment's own keys. Its blocks of `width` rows are numbered on
// within the unit.
struct Run {
  int64_t start, len, width, first_block;
};

struct Segment {
  int64_t q_start, q_len, own, prefix;  // indices into the unit's runs; prefix -1: none
};

// A comparison: segments that share keys, and no key with any other unit.
struct Unit {
  std::vector<Run> runs;
  std::vector<Segment> segments;
  int64_t num_blocks = 0;
  double cost = 0;
};

using Ranges = std::vector<std::pair<int64_t, int64_t>>;  // [first, last) rows, in order and apart

struct Plan {
  std::vector<Unit> units;  // the costly ones first
  Ranges queries, keys;     // rows that some segment covers
};

// From int32 [6, s]: q_start, q_len, k_start, k_len, prefix_start, prefix_len; checked against tq
// and t.
inline Plan make_plan(const at::Tensor& segments, int64_t tq, int64_t t) {
  TORCH_CHECK(segments.dim() == 2 && segments.size(0) == 6 && segments.scalar_type() == at::kInt &&
                  segments.is_contiguous(),
              "packed_attention: segments must be int32 [6, s], got ", segments.scalar_type(), " ",
              segments.sizes());
  const int64_t s = segments.size(1);
  const auto at = [&, data = segments.const_data_ptr<int32_t>()](
                      int64_t row, int64_t i) -> int64_t { return data[row * s + i]; };
  std::map<int64_t, size_t> unit_of;  // first key row of a run that others may share -> unit
  Plan plan;
  auto& [units, query_runs, key_runs] = plan;
  const auto run_of = [&](Unit& unit, int64_t start, int64_t len) -> int64_t {
    for (size_t i = 0; i < unit.runs.size(); ++i) {
      if (unit.runs[i].start == start && unit.runs[i].len == len) return i;
    }
    const int64_t width = even_block(len, kKeys);
    unit.runs.push_back({start, len, width, unit.num_blocks});
    unit.num_blocks += (len + width - 1) / width;
    key_runs.emplace_back(start, start + len);
    return unit.runs.size() - 1;
  };
  for (int64_t i = 0; i < s; ++i) {
    const int64_t q_start = at(0, i), q_len = at(1, i), k_start = at(2, i), k_len = at(3, i);
    const int64_t prefix_start = at(4, i), prefix_len = at(5, i);
    TORCH_CHECK(q_start >= 0 && q_len > 0 && q_start + q_len <= tq && k_start >= 0 &&
                    k_len >= q_len && k_start + k_len <= t && prefix_start >= 0 &&
                    prefix_len >= 0 && prefix_start + prefix_len <= t,
                "packed_attention: segment ", i, " has queries ", q_start, "+", q_len, " of ", tq,
                ", keys ", k_start, "+", k_len, ", prefix ", prefix_start, "+", prefix_len, " of ",
                t);
    const auto [place, fresh] =
        unit_of.try_emplace(prefix_len > 0 ? prefix_start : k_start, units.size());
    if (fresh) units.emplace_back();
    Unit& unit = units[place->second];
    const int64_t prefix = prefix_len > 0 ? run_of(unit, prefix_start, prefix_len) : -1;
    unit.segments.push_back({q_start, q_len, run_of(unit, k_start, k_len), prefix});
    unit.cost += static_cast<double>(q_len + 16) * (prefix_len + k_len - q_len / 2.0) + k_len;
    query_runs.emplace_back(q_start, q_start + q_len);
  }
  for (auto* runs :
       {&key_runs,
        &query_runs}) {  // each row has one owner, or threads would write over one another
    std::sort(runs->begin(), runs->end());
    for (size_t i = 1; i < runs->size(); ++i) {
      TORCH_CHECK((*runs)[i].first >= (*runs)[i - 1].second,
                  "packed_attention: segments overlap at ", runs == &key_runs ? "key" : "query",
                  " row ", (*runs)[i].first);
    }
  }
  std::sort(units.begin(), units.end(),
            [](const Unit& x, const Unit& y) { return x.cost > y.cost; });
  return plan;
}

// Zeros in the rows of x that no range covers.
inline void clear_rest(at::Tensor& x, const Ranges& ranges) {
  int64_t end = 0;
  for (const auto& [first, last] : ranges) {
    if (first > end) x.slice(0, end, first).zero_();
    end = last;
  }
  if (end < x.size(0)) x.slice(0, end).zero_();
}

}  // namespace attention
}  // namespace rmega
