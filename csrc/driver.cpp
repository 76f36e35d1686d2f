// Runs cases from a file without PyTorch, for sanitizers and instruction counts:
//
//     driver FILE [all|tiles|features|vectors|backward] [repetitions]
//
// A case: length and text of a program; rows, storage, stride of the input; bytes and data of the input; number of
// tensors, and of each its bytes, its count and its data. All numbers are int64. Cases follow one another to the end.
// A case whose text is "pool SEMIRING LIFTS LOWERS WINDOWS WINDOW IN OUT COPIES" is a layer of a convolutional arithmetic
// circuit, in both directions: the stride is its number of locations, its tensors are the weights, the index and the scale
// (of no numbers for none).
// One whose text is "recur CELL TIMES BACKWARDS" and a program is a recurrent net: the input holds the gates, and the last
// two tensors are the state before and the memory.
// With "unrecur" and the program of the transposed matrix it is the way back: the input holds the gradient of the states,
// and the last four tensors are the state and the memory before, what was kept, and the states.
// Printed are their number, the instruction set, and a digest of what they put out on tiles.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "backward.h"
#include "convolve.h"
#include "execute.h"
#include "pooled.h"
#include "recur.h"

namespace {

struct File {
  std::FILE* file;
  explicit File(const char* name) : file(std::fopen(name, "rb")) {
    if (!file) throw std::runtime_error("the file can't be opened");
  }
  ~File() { std::fclose(file); }
  bool read(void* to, size_t bytes) { return bytes == 0 || std::fread(to, 1, bytes, file) == bytes; }
  int64_t number() {
    int64_t n;
    if (!read(&n, sizeof n)) throw std::runtime_error("the file ends too early");
    return n;
  }
  // Exactly as large as what it holds, so that a read beyond its end is noticed.
  std::vector<char> bytes() {
    std::vector<char> data(number());
    if (!read(data.data(), data.size())) throw std::runtime_error("the file ends too early");
    return data;
  }
};

// All gradients, or a part of them that differs from case to case; the outcome of the case is the gradient of its own.
void backward(const std::string& text, const structmat::Plan& plan, const structmat::Batch& batch,
              const std::vector<structmat::Array>& tensors, int64_t size, int number, int repetitions) {
  structmat::Wanted wanted;
  wanted.input = number % 3 != 1;
  std::vector<std::vector<char>> gradients(plan.sizes.size());
  std::vector<void*> places(plan.sizes.size(), nullptr);
  for (size_t i = 0; i < plan.sizes.size(); ++i) {
    wanted.tensors.push_back(!plan.is_index[i] && (number % 2 == 0 || i % 2 == 0));
    if (!wanted.tensors[i]) continue;
    gradients[i].resize(plan.sizes[i] * size);
    places[i] = gradients[i].data();
  }
  std::vector<char> grad_x(wanted.input ? batch.rows * plan.in_features * size : 0);
  structmat::BackwardBatch own{batch.x, batch.x_stride, batch.y,    batch.y_stride,
                               wanted.input ? grad_x.data() : nullptr, batch.rows, batch.storage};
  const structmat::BackwardPlan made = structmat::make_backward_plan(text, wanted);
  for (int r = 0; r < repetitions; ++r)
    structmat::execute_backward(made, own, tensors.data(), places.data(), structmat::serially);
  const int64_t count = structmat::kept_numbers(plan, batch.rows, batch.storage);
  if (count == 0) return;
  std::vector<char> y(batch.rows * plan.out_features * size), kept(count * (size == 8 ? 8 : 4));
  structmat::Batch again = batch;
  again.y = y.data(), again.y_stride = plan.out_features, again.kept = kept.data();
  structmat::execute(plan, again, tensors.data(), structmat::serially, 2);
  wanted.kept = true, own.kept = kept.data();
  structmat::execute_backward(structmat::make_backward_plan(text, wanted), own, tensors.data(), places.data(),
                              structmat::serially);
}

// With the rows of the input, of the outcome, or of both side by side.
void by_features(const structmat::Plan& plan, const structmat::Batch& batch,
                 const std::vector<structmat::Array>& tensors, int64_t size, int repetitions) {
  const int64_t apart = batch.rows + 3;
  std::vector<char> x((plan.in_features * apart - 3) * size), y((plan.out_features * apart - 3) * size);
  for (int64_t row = 0; row < batch.rows; ++row)
    for (int64_t i = 0; i < plan.in_features; ++i)
      std::memcpy(&x[(i * apart + row) * size], static_cast<const char*>(batch.x) + (row * batch.x_stride + i) * size,
                  size);
  for (int which = 1; which < 4; ++which) {
    structmat::Batch own = batch;
    if (which & 1) own.x = x.data(), own.x_stride = apart, own.x_by_features = true;
    if (which & 2) own.y = y.data(), own.y_stride = apart, own.y_by_features = true;
    for (int r = 0; r < repetitions; ++r) structmat::execute(plan, own, tensors.data(), structmat::serially, 2);
  }
}

// A layer that pools, and its gradients; the outcome forwards.
std::vector<char> pooled(const std::string& text, const structmat::Batch& batch, const std::vector<structmat::Array>& tensors,
                         int64_t size, int repetitions) {
  structmat::PoolLayer layer{};
  std::istringstream words(text.substr(5));
  int semiring;
  words >> semiring >> layer.lifts >> layer.lowers >> layer.windows >> layer.window >> layer.in >> layer.out >> layer.copies;
  if (!words || tensors.size() != 3) throw std::runtime_error("a layer is not complete");
  layer.semiring = structmat::Semiring(semiring), layer.storage = batch.storage;
  layer.locations = batch.x_stride, layer.batch = batch.rows, layer.x = batch.x, layer.weight = tensors[0].data;
  layer.child = static_cast<const int64_t*>(tensors[1].data), layer.slot = layer.child + layer.windows * layer.window;
  layer.x_scale = tensors[2].count ? static_cast<const int64_t*>(tensors[2].data) : nullptr;
  std::vector<char> z(layer.windows * layer.out * layer.batch * size), grad_x(layer.locations * layer.in * layer.batch * size);
  std::vector<char> grad_weight(layer.copies * layer.out * layer.in * size), grad = z;
  const bool scaled = layer.semiring == structmat::Semiring::scaled;
  const int64_t bytes = scaled ? sizeof(int64_t) : layer.semiring == structmat::Semiring::normalized ? size : 0;
  std::vector<char> scale(layer.windows * layer.batch * bytes);
  for (int r = 0; r < repetitions; ++r) {
    structmat::pool_forward(layer, z.data(), scale.data(), structmat::serially);
    grad = z;
    structmat::pool_backward(layer, z.data(), scale.data(), grad.data(), grad_x.data(), grad_weight.data(),
                             structmat::serially);
    structmat::pool_backward(layer, z.data(), scale.data(), grad.data(), nullptr, grad_weight.data(), structmat::serially);
    structmat::pool_backward(layer, z.data(), scale.data(), grad.data(), grad_x.data(), nullptr, structmat::serially);
  }
  return z;
}

// Images through convolutions; the text has their height and width, and whether there is a bias, before the steps.
std::vector<char> convolved(const std::string& text, const structmat::Batch& batch,
                            const std::vector<structmat::Array>& tensors, int64_t size, int repetitions) {
  std::istringstream words(text.substr(9));
  structmat::Images images{};
  bool has_bias;
  words >> images.height >> images.width >> has_bias >> std::ws;
  std::string steps_text;
  std::getline(words, steps_text);
  std::vector<structmat::Convolution> steps = structmat::convolutions_of(steps_text);
  images.count = batch.rows, images.x = batch.x, images.storage = batch.storage;
  int64_t height = images.height, width = images.width;
  const structmat::Array* own = tensors.data();
  for (structmat::Convolution& step : steps) {
    step.weight = own[0].data;
    if (step.by_entries) {
      step.start = static_cast<const int32_t*>(own[1].data), step.column = static_cast<const int32_t*>(own[2].data);
      structmat::check_entries(step, own[0].count);
    }
    own += step.tensors();
    height = step.height.places(height), width = step.width.places(width);
  }
  if (has_bias) images.bias = own->data;
  std::vector<char> y(images.count * steps.back().out * height * width * size);
  images.y = y.data();
  for (int r = 0; r < repetitions; ++r) structmat::convolve(steps, images, structmat::serially, 1 + r % 2);
  structmat::convolve(steps, images, structmat::serially, 100);  // as if channels were shared by threads
  return y;
}

// What the text of a recurrent net says, after its first word.
template <class Sequence>
structmat::Plan begun(const std::string& text, const structmat::Batch& batch, Sequence& q) {
  std::istringstream words(text.substr(text.find(' ')));
  int cell;
  words >> cell >> q.times >> q.backwards >> std::ws;
  std::string program;
  std::getline(words, program);
  q.cell = structmat::Cell(cell), q.rows = batch.rows, q.storage = batch.storage;
  const bool few = structmat::runs_by_vectors(batch.rows, batch.storage);
  return structmat::make_plan(program, few ? structmat::Use::vectors : structmat::Use::tiles);
}

// All states of a recurrent net.
std::vector<char> recurred(const std::string& text, const structmat::Batch& batch,
                           const std::vector<structmat::Array>& tensors, const std::vector<char>& memory, int64_t size,
                           int repetitions) {
  structmat::Sequence q{};
  const structmat::Plan plan = begun(text, batch, q);
  q.size = plan.in_features;
  const int64_t wide = structmat::gates_of(q.cell) * q.size;
  q.x = batch.x, q.x_row = wide, q.x_time = wide * q.rows;
  q.start = tensors[tensors.size() - 2].data, q.start_row = q.size;
  std::vector<char> y(q.times * q.rows * q.size * size), held = memory;
  q.memory = held.data(), q.y = y.data(), q.y_row = q.size, q.y_time = q.rows * q.size;
  for (int r = 0; r < repetitions; ++r) structmat::recur(plan, q, tensors.data(), structmat::serially, 2);
  return y;
}

// The way back of one.
std::vector<char> unrecurred(const std::string& text, const structmat::Batch& batch,
                             const std::vector<structmat::Array>& tensors, int64_t size, int repetitions) {
  structmat::SequenceBack q{};
  const structmat::Plan plan = begun(text, batch, q);
  q.size = plan.out_features;
  const structmat::Array* last = &tensors[tensors.size() - 4];
  q.start = last[0].data, q.memory = last[1].data, q.kept = structmat::kept_of(q.cell) ? last[2].data : nullptr;
  q.y = last[3].data, q.grad = batch.x, q.grad_row = q.size, q.grad_time = q.rows * q.size;
  const int64_t state = q.rows * q.size * size, gates = q.times * state * structmat::gates_of(q.cell);
  std::vector<char> grad_x(gates), grad_s(q.cell == structmat::Cell::gru ? gates : 0), grad_start(state);
  for (int r = 0; r < repetitions; ++r) {
    std::vector<char> grad_memory(q.cell == structmat::Cell::lstm ? state : 0);
    q.grad_memory = grad_memory.empty() ? nullptr : grad_memory.data();
    q.grad_x = grad_x.data(), q.grad_s = grad_s.empty() ? nullptr : grad_s.data(), q.grad_start = grad_start.data();
    structmat::recur_back(plan, q, tensors.data(), structmat::serially, 2);
  }
  grad_x.insert(grad_x.end(), grad_start.begin(), grad_start.end());
  return grad_x;
}

// FNV-1a.
uint64_t digest(uint64_t before, const std::vector<char>& bytes) {
  for (const char byte : bytes) before = (before ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  return before;
}

int run(const char* name, const std::string& way, int repetitions) {
  const auto wanted = [&](const char* own) { return way == "all" || way == own; };
  File file(name);
  int cases = 0;
  uint64_t digested = 0xcbf29ce484222325u;
  int64_t length;
  while (file.read(&length, sizeof length)) {
    std::string text(length, ' ');
    if (!file.read(&text[0], length)) throw std::runtime_error("the file ends too early");
    structmat::Batch batch;
    batch.rows = file.number();
    batch.storage = structmat::Storage(file.number());
    batch.x_stride = file.number();
    const std::vector<char> x = file.bytes();
    std::vector<std::vector<char>> data(file.number());
    std::vector<structmat::Array> tensors;
    for (auto& own : data) {
      const int64_t count = file.number();
      own = file.bytes();
      tensors.push_back({own.data(), count});
    }
    const int64_t size = structmat::bytes_of(batch.storage);
    batch.x = x.data();
    if (text.compare(0, 5, "pool ") == 0) {
      digested = digest(digested, pooled(text, batch, tensors, size, repetitions));
      ++cases;
      continue;
    }
    if (text.compare(0, 9, "convolve ") == 0) {
      digested = digest(digested, convolved(text, batch, tensors, size, repetitions));
      ++cases;
      continue;
    }
    if (text.compare(0, 6, "recur ") == 0) {
      digested = digest(digested, recurred(text, batch, tensors, data.back(), size, repetitions));
      ++cases;
      continue;
    }
    if (text.compare(0, 8, "unrecur ") == 0) {
      digested = digest(digested, unrecurred(text, batch, tensors, size, repetitions));
      ++cases;
      continue;
    }
    const structmat::Plan plan = structmat::make_plan(text);
    if (tensors.size() != plan.sizes.size()) throw std::runtime_error("the number of tensors is wrong");
    std::vector<char> y(batch.rows * plan.out_features * size);
    batch.y = y.data(), batch.y_stride = plan.out_features;
    for (int r = 0; wanted("tiles") && r < repetitions; ++r)
      structmat::execute(plan, batch, tensors.data(), structmat::serially, 2);
    digested = digest(digested, y);
    if (wanted("vectors") && structmat::runs_by_vectors(batch.rows, batch.storage)) {
      const structmat::Plan few = structmat::make_plan(text, structmat::Use::vectors);
      for (int r = 0; r < repetitions; ++r)
        structmat::execute_vectors(few, batch, tensors.data(), structmat::serially, 2);
    }
    if (wanted("features")) by_features(plan, batch, tensors, size, repetitions);
    if (wanted("backward")) backward(text, plan, batch, tensors, size, cases, repetitions);
    ++cases;
  }
  std::printf("%d cases, %s, %016llx\n", cases, structmat::chosen().name, static_cast<unsigned long long>(digested));
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s FILE [all|tiles|features|vectors|backward] [repetitions]\n", arguments[0]);
    return 2;
  }
  try {
    return run(arguments[1], count > 2 ? arguments[2] : "all", count > 3 ? std::atoi(arguments[3]) : 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
