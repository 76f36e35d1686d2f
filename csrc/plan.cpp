#include "plan.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace structmat {
namespace {

// A program as it stands in the text.
struct Node {
  std::string kind;
  std::vector<int64_t> numbers;
  std::vector<Node> parts;
  int64_t in = 0, out = 0;
};

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("structmat: bad program: " + why); }

class Reader {
 public:
  explicit Reader(const std::string& text) : words_(text) {}

  Node node() {
    Node n;
    n.kind = word();
    if (n.kind == "chain" || n.kind == "sum") {
      const int64_t count = number(1, 1 << 20);
      for (int64_t i = 0; i < count; ++i) n.parts.push_back(node());
      n.in = n.parts.front().in;
      n.out = n.kind == "chain" ? n.parts.back().out : n.parts.front().out;
      for (size_t i = 1; i < n.parts.size(); ++i) {
        const Node &before = n.parts[i - 1], &after = n.parts[i];
        if (n.kind == "chain" ? before.out != after.in : before.in != after.in || before.out != after.out)
          refuse("the sizes of neighbouring parts differ");
      }
      return n;
    }
    const int64_t count = arity(n.kind);
    if (n.kind == "shuffle") {
      const int64_t axes = number(1, 64);
      n.numbers.push_back(axes);
      for (int64_t i = 0; i < 2 * axes; ++i) n.numbers.push_back(number());
    } else {
      for (int64_t i = 0; i < count; ++i) n.numbers.push_back(number());
    }
    measure(n);
    return n;
  }

  std::string word() {
    std::string w;
    if (!(words_ >> w)) refuse("it ends too early");
    return w;
  }

  int64_t number(int64_t least = 0, int64_t most = int64_t(1) << 40) {
    int64_t value;
    if (!(words_ >> value) || value < least || value > most) refuse("a number is missing or out of range");
    return value;
  }

  bool at_end() {
    std::string w;
    return !(words_ >> w);
  }

 private:
  static int64_t arity(const std::string& kind) {
    if (kind == "contract") return 8;       // a b c d shared_a shared_d transposed weight
    if (kind == "diagonal") return 2;       // size weight
    if (kind == "permute") return 3;        // size inverse index
    if (kind == "shuffle") return 0;        // axes sizes.. order..
    if (kind == "sparse") return 6;         // height width entries transposed values places
    if (kind == "interpolate") return 5;    // rank size transposed weight places
    if (kind == "windowed") return 9;       // height width terms left right transposed left right windows
    if (kind == "pad") return 3;            // size padded before
    if (kind == "crop") return 3;           // size kept before
    if (kind == "activate") return 8;       // kind size, of bias and slope: number + 1 (0: none) inner count
    if (kind == "keep") return 1;           // size
    refuse("unknown stage " + kind);
  }

  static void measure(Node& n) {
    const auto& v = n.numbers;
    if (n.kind == "contract") n.in = v[0] * v[2] * v[3], n.out = v[0] * v[1] * v[3];
    else if (n.kind == "diagonal" || n.kind == "permute") n.in = n.out = v[0];
    else if (n.kind == "shuffle") {
      n.in = 1;
      for (int64_t i = 0; i < v[0]; ++i) n.in *= v[1 + i];
      n.out = n.in;
    } else if (n.kind == "sparse") n.in = v[3] ? v[0] : v[1], n.out = v[3] ? v[1] : v[0];
    else if (n.kind == "interpolate") n.in = v[2] ? v[0] : v[1], n.out = v[2] ? v[1] : v[0];
    else if (n.kind == "windowed") n.in = v[5] ? v[0] : v[1], n.out = v[5] ? v[1] : v[0];
    else if (n.kind == "activate") n.in = n.out = v[1];
    else if (n.kind == "keep") n.in = n.out = v[0];
    else n.in = v[0], n.out = v[1];
    if (n.in < 1 || n.out < 1) refuse(n.kind + " of size 0");
    if (n.kind == "pad" && v[2] + v[0] > v[1]) refuse("a pad that is too short");
    if (n.kind == "crop" && v[2] + v[1] > v[0]) refuse("a crop that is too long");
    if (n.kind == "activate")
      for (int k : {2, 5})
        if (v[0] >= activations || (v[k] && (v[k + 1] < 1 || v[k + 2] < 1))) refuse("an activation that is none");
    if (n.kind == "interpolate" && (v[0] < 1 || v[0] >= v[1])) refuse("an interpolation of a bad rank");
  }

  std::istringstream words_;
};

struct Value {
  int slot;
  int64_t row;
};

class Layout {
 public:
  explicit Layout(Plan& plan) : plan_(plan) {}

  void run(const Node& program) {
    plan_.in_features = program.in;
    plan_.out_features = program.out;
    plan_.volume = program.in + volume_of(program);
    const Value input = allocate(program.in);
    plan_.input = input.row;
    const Value output = lower(program, input, nullptr, false);
    plan_.output = output.row;
  }

 private:
  static int64_t volume_of(const Node& n) {
    if (n.kind == "keep" || n.kind == "crop") return 0;
    int64_t sum = n.parts.empty() ? n.out : 0;
    for (const Node& part : n.parts) sum += volume_of(part);
    return sum;
  }

  Value allocate(int64_t rows) {
    // The lowest gap between slots in use.
    std::vector<Slot> used;
    for (size_t i = 0; i < references_.size(); ++i)
      if (references_[i] > 0 || plan_.use == Use::derivatives) used.push_back(plan_.slots[i]);
    const int64_t first = lowest_gap(used, rows);
    plan_.slots.push_back({first, rows});
    references_.push_back(1);
    plan_.rows = std::max(plan_.rows, first + rows);
    return {int(references_.size()) - 1, first};
  }

  void keep(Value v) { ++references_[v.slot]; }
  void release(Value v) { --references_[v.slot]; }

  Instruction& emit(Instruction::Kind kind, Value from, Value to, int64_t rows, bool add) {
    Instruction i;
    i.kind = kind, i.from = from.row, i.to = to.row, i.rows = rows, i.add = add;
    plan_.instructions.push_back(i);
    return plan_.instructions.back();
  }

  int tensor(int64_t number, int64_t size, bool is_index) {
    if (number > (1 << 20)) refuse("the number of a tensor is out of range");
    if (int64_t(plan_.sizes.size()) <= number) {
      plan_.sizes.resize(number + 1, -1);
      plan_.is_index.resize(number + 1, 0);
    }
    if (plan_.sizes[number] >= 0 && (plan_.sizes[number] != size || bool(plan_.is_index[number]) != is_index))
      refuse("a tensor is read in two ways");
    plan_.sizes[number] = size;
    plan_.is_index[number] = is_index;
    return int(number);
  }

  // Consumes one reference of `source`; the outcome carries one.
  Value lower(const Node& n, Value source, const Value* into, bool add) {
    if (n.kind == "chain") {
      Value current = source;
      for (size_t i = 0; i < n.parts.size();) {
        const int64_t base = plan_.use == Use::tiles && stages_in_registers(n, i, 4, Quads::most) ? 4 : 2;
        const size_t merged =
            plan_.use == Use::vectors ? 0 : stages_in_registers(n, i, base, base == 4 ? Quads::most : Radix::most);
        const bool last = i + std::max<size_t>(merged, 1) == n.parts.size();
        const Value* target = last ? into : nullptr;
        current = merged ? in_place(n, i, merged, base, current, target, last && add)
                         : lower(n.parts[i], current, target, last && add);
        i += std::max<size_t>(merged, 1);
      }
      return current;
    }
    if (n.kind == "sum") {
      const Value result = into ? *into : allocate(n.out);
      if (into) keep(*into);
      for (size_t i = 0; i < n.parts.size(); ++i) {
        if (i + 1 < n.parts.size()) keep(source);
        const Value part = lower(n.parts[i], source, &result, add || i > 0);
        release(part);
      }
      return result;
    }
    return stage(n, source, into, add);
  }

  // How many stages of base x base blocks, from i on, act on the same groups of rows.
  static size_t stages_in_registers(const Node& chain, size_t i, int64_t base, int most) {
    int64_t lowest = std::numeric_limits<int64_t>::max(), highest = 0;
    size_t count = 0;
    for (; i + count < chain.parts.size() && count < size_t(most); ++count) {
      const Node& s = chain.parts[i + count];
      const auto& v = s.numbers;
      if (s.kind != "contract" || v[1] != base || v[2] != base || v[4] || v[5]) break;
      const int64_t low = std::min(lowest, v[3]), high = std::max(highest, v[3]);
      // distances d, d base, .. in any order without gaps: the next is `base` times the highest, or the lowest by it
      if (count > 0 && v[3] != base * highest && base * v[3] != lowest) break;
      lowest = low, highest = high;
    }
    return count;
  }

  // In place, unless the source is needed again or the outcome belongs elsewhere.
  Value in_place(const Node& chain, size_t i, size_t count, int64_t base, Value source, const Value* into, bool add) {
    Value where = source;
    const int64_t rows = chain.parts[i].in;
    const bool straight = into && !add;
    if (straight || references_[source.slot] > 1 || plan_.use == Use::derivatives) {
      where = straight ? *into : allocate(rows);
      if (straight) keep(*into);
      release(source);
    }
    Instruction& made = emit(base == 4 ? Instruction::quads : Instruction::radix, source, where, rows, false);
    int64_t lowest = std::numeric_limits<int64_t>::max();
    for (size_t k = 0; k < count; ++k) lowest = std::min(lowest, chain.parts[i + k].numbers[3]);
    made.stages.count = made.quads_of.count = int(count);
    made.stages.rows = made.quads_of.rows = rows;
    made.stages.lowest = made.quads_of.lowest = lowest;
    for (size_t k = 0; k < count; ++k) {
      const auto& v = chain.parts[i + k].numbers;
      int digit = 0;
      for (int64_t d = lowest; d < v[3]; d *= base) ++digit;
      const int weight = tensor(v[7], v[0] * base * base * v[3], false);
      if (base == 4) {
        made.quads_of.digit[k] = digit, made.quads_of.weight[k] = weight;
        made.quads_of.contraction[k] = strides(v);
        if (v[3] == 1) made.quads_of.by_rows = v[6] == 0;
      } else {
        made.stages.bit[k] = digit, made.stages.weight[k] = weight;
        made.stages.transposed[k] = v[6] != 0;
      }
    }
    if (!into || straight) return where;
    keep(*into);
    emit(Instruction::copy, where, *into, rows, true);
    release(where);
    return *into;
  }

  // In place, unless the source is needed again or the outcome belongs elsewhere; for derivatives only if these are found
  // from the outcome.
  Value activation(const std::vector<int64_t>& v, Value source, const Value* into, bool add) {
    const Activate::Kind kind = Activate::Kind(v[0]);
    const bool straight = into && !add;
    Value where = source;
    if (straight || references_[source.slot] > 1 || (plan_.use == Use::derivatives && !by_value(kind))) {
      where = straight ? *into : allocate(v[1]);
      if (straight) keep(*into);
      release(source);
    }
    Instruction& made = emit(Instruction::activate, source, where, v[1], false);
    made.activation.kind = kind, made.activation.rows = v[1];
    if (v[2]) made.activation.bias = {v[3], v[4]}, made.tensor = tensor(v[2] - 1, v[4], false);
    if (v[5]) made.activation.slope = {v[6], v[7]}, made.other = tensor(v[5] - 1, v[7], false);
    if ((kind == Activate::rectifier) != (v[5] > 0)) refuse("a slope that is missing, or of no use");
    plan_.has_activations = true;
    if (!into || straight) return where;
    keep(*into);
    emit(Instruction::copy, where, *into, v[1], true);
    release(where);
    return *into;
  }

  Value stage(const Node& n, Value source, const Value* into, bool add) {
    const auto& v = n.numbers;
    if (n.kind == "activate") return activation(v, source, into, add);
    if (n.kind == "keep") {
      if (into) refuse("a value that is kept must be whole, and stand before the last stage");
      if (plan_.use != Use::vectors) emit(Instruction::keep, source, source, v[0], false).place = plan_.kept_rows;
      plan_.kept_rows += v[0];
      return source;
    }
    if (n.kind == "crop") {
      const Value part{source.slot, source.row + v[2]};
      if (!into) return part;  // the same rows, from another one on
      keep(*into);
      emit(Instruction::copy, part, *into, v[1], add);
      release(source);
      return *into;
    }
    const Value to = into ? *into : allocate(n.out);
    if (into) keep(*into);
    if (n.kind == "contract") contraction(v, source, to, add);
    else if (n.kind == "diagonal") emit(Instruction::diagonal, source, to, v[0], add).tensor = tensor(v[1], v[0], false);
    else if (n.kind == "permute") {
      if (v[1]) {
        if (!add) emit(Instruction::clear, source, to, v[0], false);
        emit(Instruction::scatter_add, source, to, v[0], true).index = tensor(v[2], v[0], true);
      } else {
        emit(Instruction::gather, source, to, v[0], add).index = tensor(v[2], v[0], true);
      }
    } else if (n.kind == "shuffle") {
      Instruction& g = emit(Instruction::gather, source, to, n.in, add);
      g.table = int(plan_.tables.size());
      plan_.tables.push_back(order(v));
    } else if (n.kind == "pad") {
      if (!add) {
        if (v[2] > 0) emit(Instruction::clear, to, to, v[2], false);
        const Value after{to.slot, to.row + v[2] + v[0]};
        if (v[1] - v[2] - v[0] > 0) emit(Instruction::clear, after, after, v[1] - v[2] - v[0], false);
      }
      emit(Instruction::copy, source, {to.slot, to.row + v[2]}, v[0], add);
    } else if (n.kind == "sparse") {
      Instruction& s = emit(Instruction::sparse, source, to, n.out, add);
      s.height = v[0], s.width = v[1], s.entries = v[2], s.transposed = v[3] != 0;
      s.tensor = tensor(v[4], v[2], false), s.index = tensor(v[5], v[2], true);
      if (v[0] > int64_t(1) << 30 || v[1] > int64_t(1) << 30 || v[2] > int64_t(1) << 30) refuse("a sparse stage that is too large");
      plan_.widest_source = std::max(plan_.widest_source, n.in);
    } else if (n.kind == "interpolate") {
      interpolation(v, source, to, add);
    } else {
      windows(v, source, to, n.out, add);
    }
    release(source);
    return to;
  }

  void contraction(const std::vector<int64_t>& v, Value source, Value to, bool add) {
    Instruction& i = emit(Instruction::contract, source, to, v[0] * v[1] * v[3], add);
    const Contract& c = i.contraction = strides(v);
    i.tensor = tensor(v[7], (c.stride_a ? c.a : 1) * c.b * c.c * (c.stride_d ? c.d : 1), false);
    i.packs = plan_.use == Use::tiles && c.stride_d && c.b >= panel_rows / 2 && c.c > 1 && c.d >= pack_together;
  }

  static Contract strides(const std::vector<int64_t>& v) {
    Contract c;
    c.a = v[0], c.b = v[1], c.c = v[2], c.d = v[3];
    const bool shared_a = v[4] != 0, shared_d = v[5] != 0 || c.d == 1, transposed = v[6] != 0;
    const int64_t deep = shared_d ? 1 : c.d;
    c.stride_d = shared_d ? 0 : 1;
    c.stride_b = transposed ? deep : c.c * deep;
    c.stride_c = transposed ? c.b * deep : deep;
    c.stride_a = shared_a ? 0 : c.b * c.c * deep;
    return c;
  }

  // [I, w] P and its transpose: the inputs in the order of the places, those of the identity, the product of the rest.
  void interpolation(const std::vector<int64_t>& v, Value source, Value to, bool add) {
    const int64_t rank = v[0], size = v[1], others = size - rank;
    const int weight = tensor(v[3], rank * others, false), places = tensor(v[4], size, true);
    const Value sorted = allocate(size);
    auto product = [&](bool transposed, Value from, Value onto) {
      Instruction& i = emit(Instruction::contract, from, onto, transposed ? others : rank, !transposed);
      i.contraction = transposed ? Contract{1, others, rank, 1, 0, 1, others, 0}
                                 : Contract{1, rank, others, 1, 0, others, 1, 0};
      i.tensor = weight;
    };
    if (v[2]) {  // y = P^T [I, w]^T x
      emit(Instruction::copy, source, sorted, rank, false);
      product(true, source, {sorted.slot, sorted.row + rank});
      emit(Instruction::gather, sorted, to, size, add).index = places;
    } else {
      emit(Instruction::clear, sorted, sorted, size, false);
      emit(Instruction::scatter_add, source, sorted, size, true).index = places;
      emit(Instruction::copy, sorted, to, rank, add);
      product(false, {sorted.slot, sorted.row + rank}, to);
    }
    release(sorted);
  }

  void windows(const std::vector<int64_t>& v, Value source, Value to, int64_t rows, bool add) {
    if (!add) emit(Instruction::clear, to, to, rows, false);
    Instruction& i = emit(Instruction::windowed, source, to, rows, true);
    i.height = v[0], i.width = v[1], i.entries = v[2], i.left = v[3], i.right = v[4], i.transposed = v[5] != 0;
    plan_.terms = std::max(plan_.terms, v[2]);
    i.tensor = tensor(v[6], v[3], false), i.other = tensor(v[7], v[4], false), i.index = tensor(v[8], 4 * v[2], true);
  }

  static std::vector<int64_t> order(const std::vector<int64_t>& v) {
    const int64_t axes = v[0];
    std::vector<int64_t> sizes(v.begin() + 1, v.begin() + 1 + axes), strides(axes, 1), index{0};
    for (int64_t k = axes - 1; k > 0; --k) strides[k - 1] = strides[k] * sizes[k];
    std::vector<char> seen(axes, 0);
    for (int64_t k = 0; k < axes; ++k) {
      const int64_t axis = v[1 + axes + k];
      if (axis >= axes || seen[axis]) refuse("a shuffle that is no permutation");
      seen[axis] = 1;
      std::vector<int64_t> longer;
      longer.reserve(index.size() * sizes[axis]);
      for (int64_t before : index)
        for (int64_t i = 0; i < sizes[axis]; ++i) longer.push_back(before + i * strides[axis]);
      index.swap(longer);
    }
    return index;
  }

  Plan& plan_;
  std::vector<int> references_;  // to each slot, of what is still to be read or written
};

}  // namespace

int64_t lowest_gap(std::vector<Slot>& used, int64_t rows) {
  std::sort(used.begin(), used.end(), [](const Slot& one, const Slot& two) { return one.first < two.first; });
  int64_t first = 0;
  for (const Slot& u : used) {
    if (u.first - first >= rows) break;
    first = std::max(first, u.first + u.rows);
  }
  return first;
}

Plan make_plan(const std::string& text, Use use) {
  Reader reader(text);
  Plan plan;
  plan.use = use;
  const std::string head = reader.word();
  if (head != "rows" && head != "rows+bias") refuse("it begins with " + head);
  plan.has_bias = head == "rows+bias";
  const int64_t out_features = reader.number(1);
  const Node program = reader.node();
  if (!reader.at_end()) refuse("something follows its end");
  if (program.out != out_features) refuse("its stages put out another number than its head says");
  Layout(plan).run(program);
  plan.is_light = true;
  for (const Instruction& s : plan.instructions)
    plan.is_light &= s.kind == Instruction::quads || s.kind == Instruction::radix || s.kind == Instruction::diagonal;
  plan.tensors = int64_t(plan.sizes.size());
  if (plan.has_bias) {
    plan.sizes.push_back(plan.out_features);
    plan.is_index.push_back(0);
  }
  for (int64_t size : plan.sizes)
    if (size < 0) refuse("a tensor is never read");
  return plan;
}

}  // namespace structmat
