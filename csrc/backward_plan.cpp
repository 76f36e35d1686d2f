#include "backward_plan.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace structmat {
namespace {

int64_t rows_read(const Instruction& i) {
  if (i.kind == Instruction::contract) return i.contraction.a * i.contraction.c * i.contraction.d;
  if (i.kind == Instruction::sparse || i.kind == Instruction::windowed) return i.transposed ? i.height : i.width;
  return i.rows;
}

// Whether what comes back to a value is as long as the value, and each number depends on one of the gradient only.
bool works_in_place(const Instruction& i) {
  return i.kind == Instruction::radix || i.kind == Instruction::diagonal || i.kind == Instruction::copy ||
         i.kind == Instruction::activate;
}

// What puts out no value of its own.
bool is_silent(const Instruction& i) { return i.kind == Instruction::clear || i.kind == Instruction::keep; }

// A range of the memory, for as long as something in it is needed.
struct Block {
  int64_t rows;
  int64_t birth = -1, death = -1;  // steps
  int64_t first = 0;
};

// Rows of a block, until it is known where the block lies.
struct Place {
  int block = -1;
  int64_t offset = 0;
};

struct Draft {
  Step step;
  Place value_from, value_to, from, to;
};

class Reversal {
 public:
  explicit Reversal(BackwardPlan& made) : made_(made), plan_(made.plan), wanted_(made.wanted) {}

  void run() {
    const size_t slots = plan_.slots.size();
    values_.assign(slots, -1), gradients_.assign(slots, -1);
    active_.assign(slots, 0), needed_.assign(slots, 0), kept_.assign(slots, 0);
    input_ = slot_of(plan_.input), output_ = slot_of(plan_.output);
    number_of_writers();
    mark();
    sums();
    forward();
    backward();
    place();
  }

 private:
  int slot_of(int64_t row) const {
    const auto after = std::upper_bound(plan_.slots.begin(), plan_.slots.end(), row,
                                        [](int64_t r, const Slot& s) { return r < s.first; });
    return int(after - plan_.slots.begin()) - 1;
  }

  bool wants(int tensor) const { return tensor >= 0 && wanted_.tensors[tensor]; }

  bool weighs(const Instruction& i) const {
    switch (i.kind) {
      case Instruction::contract:
      case Instruction::diagonal:
      case Instruction::sparse: return wants(i.tensor);
      case Instruction::activate:
      case Instruction::windowed: return wants(i.tensor) || wants(i.other);
      case Instruction::radix:
        for (int k = 0; k < i.stages.count; ++k)
          if (wants(i.stages.weight[k])) return true;
        return false;
      default: return false;
    }
  }

  // First row of the value that derivatives are found from; -1 for none.
  static int64_t value_read(const Instruction& i) {
    if (i.kind != Instruction::activate) return i.from;
    return i.activation.kind == Activate::identity ? -1 : by_value(i.activation.kind) ? i.to : i.from;
  }

  void number_of_writers() {
    first_writer_.assign(plan_.slots.size(), -1);
    for (size_t i = plan_.instructions.size(); i-- > 0;) first_writer_[slot_of(plan_.instructions[i].to)] = int(i);
  }

  // Which values have a gradient of use, and which are needed for one.
  void mark() {
    const auto& all = plan_.instructions;
    active_[input_] = wanted_.input;
    for (const Instruction& i : all)
      if (!is_silent(i) && (active_[slot_of(i.from)] || weighs(i))) active_[slot_of(i.to)] = 1;
    for (const Instruction& i : all) {
      const bool is_read = i.kind == Instruction::activate ? value_read(i) >= 0 && active_[slot_of(i.to)] : weighs(i);
      if (is_read) needed_[slot_of(value_read(i))] = 1;
      if (i.kind == Instruction::keep && wanted_.kept && plan_.slots[slot_of(i.to)].rows == i.rows) kept_[slot_of(i.to)] = 1;
    }
    for (size_t i = all.size(); i-- > 0;)
      if (!is_silent(all[i]) && needed_[slot_of(all[i].to)] && !kept_[slot_of(all[i].to)]) needed_[slot_of(all[i].from)] = 1;
  }

  // Places for the gradients of weights.
  void sums() {
    made_.place.assign(plan_.sizes.size(), -1);
    own_.assign(plan_.instructions.size(), {-1, -1, -1});
    const auto add = [&](Sums& s) {
      s.first = made_.total;
      made_.total += (s.count + 15) / 16 * 16;
      made_.sums.push_back(s);
      return s.first;
    };
    const auto direct = [&](int tensor) {
      if (!wants(tensor) || made_.place[tensor] >= 0) return;
      Sums s{};
      s.order = Sums::direct, s.tensor = tensor, s.count = plan_.sizes[tensor];
      made_.place[tensor] = add(s);
    };
    for (size_t n = 0; n < plan_.instructions.size(); ++n) {
      const Instruction& i = plan_.instructions[n];
      if (!weighs(i)) continue;
      Sums s{};
      s.tensor = i.tensor, s.number = int(n), s.contraction = i.contraction, s.stages = i.stages;
      if (i.kind == Instruction::contract && sums_of(i.contraction).along != BlockSums::none) {
        s.order = Sums::blocks, s.count = sums_of(i.contraction).count;
        own_[n][0] = add(s);
      } else if (i.kind == Instruction::sparse) {
        s.order = Sums::entries, s.count = i.entries;
        own_[n][0] = add(s);
      } else if (i.kind == Instruction::radix) {
        for (s.stage = 0; s.stage < i.stages.count; ++s.stage) {
          s.order = Sums::groups, s.tensor = i.stages.weight[s.stage], s.count = 2 * i.rows;
          if (wants(s.tensor)) own_[n][s.stage] = add(s);
        }
      } else {
        direct(i.tensor), direct(i.other);
      }
    }
    if (plan_.has_bias) direct(int(plan_.sizes.size()) - 1);
  }

  int block(int64_t rows) {
    Block b;
    b.rows = rows;
    blocks_.push_back(b);
    return int(blocks_.size()) - 1;
  }

  Place in(const std::vector<int>& blocks, int64_t row) const {
    const int slot = slot_of(row);
    return {blocks[slot], row - plan_.slots[slot].first};
  }

  Draft& step(Step::Kind kind) {
    drafts_.emplace_back();
    drafts_.back().step.kind = kind;
    return drafts_.back();
  }

  void forward() {
    const auto value = [&](int slot) {
      if (values_[slot] < 0) values_[slot] = block(plan_.slots[slot].rows);
    };
    if (needed_[input_]) {
      value(input_);
      step(Step::load_input).value_to = in(values_, plan_.input);
    }
    for (size_t n = 0; n < plan_.instructions.size(); ++n) {
      const Instruction& i = plan_.instructions[n];
      if (!needed_[slot_of(i.to)] || (i.kind == Instruction::keep) != bool(kept_[slot_of(i.to)])) continue;
      value(slot_of(i.to));
      if (i.kind == Instruction::keep) {
        blocks_[values_[slot_of(i.to)]].first = kept_from + i.place;
        continue;
      }
      Draft& d = step(Step::forward);
      d.step.what = i, d.step.number = int(n);
      d.value_to = in(values_, i.to);
      d.value_from = i.kind == Instruction::clear ? d.value_to : in(values_, i.from);
    }
  }

  // The gradient that comes back to what an instruction reads: where, and whether it is added to what is there.
  void arrive(const Instruction& i, int64_t n, bool overwrites, Draft& d) {
    const int slot = slot_of(i.from), to = slot_of(i.to);
    const int64_t rows = plan_.slots[slot].rows;
    const bool whole = rows_read(i) == rows;
    d.step.add = slot != to;  // in place otherwise
    if (gradients_[slot] < 0) {
      const bool last = first_writer_[to] == n && plan_.slots[to].rows == i.rows;
      if (works_in_place(i) && whole && last) {
        gradients_[slot] = gradients_[to];
        d.step.add = false;
      } else {
        gradients_[slot] = block(rows);
        if (whole && overwrites) d.step.add = false;
        else erase(slot);
      }
    }
    d.from = in(gradients_, i.from);
  }

  void erase(int slot) {
    Draft& d = step(Step::clear);
    d.from = {gradients_[slot], 0};
    d.step.rows = plan_.slots[slot].rows;
  }

  void backward() {
    if (active_[output_] || (plan_.has_bias && wants(int(plan_.sizes.size()) - 1))) {
      gradients_[output_] = block(plan_.slots[output_].rows);
      if (plan_.slots[output_].rows != plan_.out_features) erase(output_);
      step(Step::load_gradient).to = in(gradients_, plan_.output);
    }
    for (size_t n = plan_.instructions.size(); n-- > 0;) {
      const Instruction& i = plan_.instructions[n];
      if (is_silent(i) || gradients_[slot_of(i.to)] < 0) continue;
      Draft d;
      d.step.kind = Step::backward, d.step.what = i, d.step.number = int(n);
      std::copy(own_[n].begin(), own_[n].end(), d.step.sums);
      d.step.weighs = weighs(i);
      const bool passes = active_[slot_of(i.from)];
      if (!passes && !d.step.weighs) continue;
      d.to = in(gradients_, i.to);
      if (passes) {
        bool overwrites = i.kind != Instruction::sparse && i.kind != Instruction::windowed;
        if (i.kind == Instruction::gather) overwrites = invert(d.step.what);
        arrive(i, int64_t(n), overwrites, d);
        if (i.kind == Instruction::copy && !d.step.add && d.from.block == d.to.block) continue;  // it is there already
      }
      if ((d.step.weighs || i.kind == Instruction::activate) && value_read(i) >= 0)
        d.value_from = in(values_, value_read(i));
      drafts_.push_back(d);
    }
    if (!wanted_.input) return;
    if (gradients_[input_] < 0) {
      gradients_[input_] = block(plan_.slots[input_].rows);
      erase(input_);
    }
    step(Step::store_gradient).from = in(gradients_, plan_.input);
  }

  // A fixed permutation backwards is the inverse one; an index that is given may be any.
  bool invert(Instruction& i) {
    if (i.table < 0) return false;
    const std::vector<int64_t> table = plan_.tables[i.table];
    std::vector<int64_t> inverse(table.size());
    for (size_t k = 0; k < table.size(); ++k) inverse[table[k]] = int64_t(k);
    i.table = int(plan_.tables.size());
    plan_.tables.push_back(std::move(inverse));
    return true;
  }

  // Blocks that are never needed at the same time share rows.
  void place() {
    const auto touch = [&](const Place& p, int64_t n) {
      if (p.block < 0) return;
      Block& b = blocks_[p.block];
      if (b.birth < 0) b.birth = n;
      b.death = n;
    };
    for (size_t n = 0; n < drafts_.size(); ++n)
      for (const Place* p : {&drafts_[n].value_from, &drafts_[n].value_to, &drafts_[n].from, &drafts_[n].to})
        touch(*p, int64_t(n));
    std::vector<Block*> order;
    for (Block& b : blocks_)
      if (b.birth >= 0 && b.first < kept_from) order.push_back(&b);
    std::stable_sort(order.begin(), order.end(), [](const Block* a, const Block* b) { return a->birth < b->birth; });
    for (size_t k = 0; k < order.size(); ++k) {
      std::vector<Slot> used;
      for (size_t j = 0; j < k; ++j)
        if (order[j]->death >= order[k]->birth) used.push_back({order[j]->first, order[j]->rows});
      order[k]->first = lowest_gap(used, order[k]->rows);
      made_.rows = std::max(made_.rows, order[k]->first + order[k]->rows);
    }
    const auto row = [&](const Place& p) { return p.block < 0 ? -1 : blocks_[p.block].first + p.offset; };
    for (Draft& d : drafts_) {
      Step s = d.step;
      s.what.from = row(d.value_from), s.what.to = row(d.value_to);
      s.from = row(d.from), s.to = row(d.to);
      made_.steps.push_back(s);
    }
  }

  BackwardPlan& made_;
  Plan& plan_;
  const Wanted& wanted_;
  std::vector<int> values_, gradients_;  // the block of every slot's value and gradient, or -1
  std::vector<char> active_, needed_, kept_;
  std::vector<int> first_writer_;
  std::vector<std::array<int64_t, Radix::most>> own_;  // of every instruction: where its own sums begin, or -1
  std::vector<Block> blocks_;
  std::vector<Draft> drafts_;
  int input_ = 0, output_ = 0;
};

}  // namespace

BlockSums sums_of(const Contract& s) {
  // What one register of a row costs: multiply-adds with the longer side filled up to whole registers, and the
  // transposition of its values; or a product for every pair, and a share in summing its lanes.
  // Where an axis is shared, its sums are taken out of the registers once.
  const int64_t b = (s.b + 15) / 16 * 16, c = (s.c + 15) / 16 * 16;
  const int64_t together = (s.stride_a ? 1 : s.a) * (s.stride_d ? 1 : s.d);
  const int64_t along_c = c * s.b + 4 * c, along_b = b * s.c + 4 * b, alone = s.b * s.c + s.b * s.c / together;
  BlockSums made{BlockSums::none, s.b, s.c, 0};
  if (alone <= along_b && alone <= along_c) return made;
  made.along = along_c <= along_b ? BlockSums::c : BlockSums::b;
  made.lines = made.along == BlockSums::c ? s.b : s.c;
  made.width = made.along == BlockSums::c ? c : b;
  made.count = (s.stride_a ? s.a : 1) * (s.stride_d ? s.d : 1) * made.lines * made.width;
  return made;
}

BackwardPlan make_backward_plan(const std::string& text, const Wanted& wanted) {
  BackwardPlan made;
  made.plan = make_plan(text, Use::derivatives);
  made.wanted = wanted;
  if (wanted.tensors.size() != made.plan.sizes.size())
    throw std::invalid_argument("structmat: the number of gradients is wrong");
  for (size_t i = 0; i < wanted.tensors.size(); ++i)
    if (wanted.tensors[i] && made.plan.is_index[i])
      throw std::invalid_argument("structmat: integers have no gradient");
  Reversal(made).run();
  return made;
}

}  // namespace structmat
