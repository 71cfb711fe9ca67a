#include "sequence.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "scratch.h"

namespace updp {
namespace {

// Of the maps between, as much as leaves the second cache room for weights and a block's scratch.
constexpr int64_t kCacheElements = (512 << 10) / int64_t{sizeof(float)};
// Rows of a strip are a multiple of this, so that tiles of Winograd lie as in the whole map.
constexpr int64_t kRowsTogether = 4;

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t rows_together(const SequenceStep& step) { return std::max<int64_t>(conv_tile(step.algorithm), 1); }

// The first row of its input that a row of a step's output needs.
int64_t first_needed(const ConvGeometry& g, int64_t row) { return std::max<int64_t>(row * g.sh - g.top, 0); }

void check(const std::vector<SequenceStep>& steps) {
  if (steps.empty()) throw std::invalid_argument("sequence: there is no convolution in it");
  for (size_t i = 0; i < steps.size(); ++i) {
    const ConvGeometry& g = steps[i].g;
    if (std::max(g.top, g.bottom) >= g.kh)
      throw std::invalid_argument("sequence: a padding of " + std::to_string(std::max(g.top, g.bottom)) +
                                  " for a weight of " + std::to_string(g.kh) + " rows");
    if (i == 0) continue;
    const ConvGeometry& before = steps[i - 1].g;
    if (g.n != before.n || g.h != before.oh || g.w != before.ow || g.c != before.k)
      throw std::invalid_argument("sequence: convolution " + std::to_string(i) +
                                  " does not fit the one before it");
  }
}

}  // namespace

Sequence::Sequence(std::vector<SequenceStep> steps, int threads) : steps_(std::move(steps)) {
  check(steps_);
  const ConvGeometry& last = steps_.back().g;
  int64_t strip = up(std::max<int64_t>(last.oh, 1), kRowsTogether);
  while (strip > kRowsTogether && memory(plan(0, std::min(4 * strip, last.oh), strip)) > kCacheElements)
    strip = up(strip / 2, kRowsTogether);
  const int64_t strips = (last.oh + strip - 1) / strip, images = std::max<int64_t>(last.n, 1);
  const int64_t parts = std::clamp<int64_t>((threads + images - 1) / images, 1, std::max<int64_t>(strips, 1));
  memory_ = 0;
  for (int64_t i = 0; i < parts; ++i) {
    parts_.push_back(
        plan(strips * i / parts * strip, std::min(strips * (i + 1) / parts * strip, last.oh), strip));
    memory_ = std::max(memory_, up(memory(parts_.back()) + parts_.back().scratch, 64));
  }
  workers_ = static_cast<int>(std::clamp<int64_t>(threads, 1, parts * images));
}

// Elements of the maps between.
int64_t Sequence::memory(const Part& part) const {
  int64_t elements = 0;
  for (size_t map = 1; map < steps_.size(); ++map)
    elements += up(part.rows[map] * steps_[map].g.w * steps_[map].g.c, 64);
  return elements;
}

// The rows with which each map begins, if the last one begins with that row; none of them is there yet.
std::vector<Sequence::Held> Sequence::needed(int64_t begin) const {
  std::vector<Held> held(steps_.size() + 1);
  held[steps_.size()] = {begin, begin};
  for (size_t step = steps_.size(); step-- > 0;) {
    int64_t row = first_needed(steps_[step].g, held[step + 1].end);
    if (step > 0) row -= row % rows_together(steps_[step - 1]);
    held[step] = {row, row};
  }
  return held;
}

Sequence::Part Sequence::plan(int64_t begin, int64_t end, int64_t strip) const {
  Part part{{}, std::vector<int64_t>(steps_.size()), 0};
  std::vector<Held> held = needed(begin);
  for (int64_t row = begin; row < end; row += strip) plan_strip(std::min(row + strip, end), held, part);
  return part;
}

// All steps for the rows of the last map up to an end.
void Sequence::plan_strip(int64_t end, std::vector<Held>& held, Part& part) const {
  const int count = static_cast<int>(steps_.size());
  std::vector<int64_t> ends(steps_.size());  // of what each step writes
  for (int step = count - 1; step >= 0; --step) {
    const ConvGeometry& g = steps_[step].g;
    ends[step] = step == count - 1 ? end : std::min(up(end, rows_together(steps_[step])), g.oh);
    end = std::min((ends[step] - 1) * g.sh - g.top + g.kh, g.h);
  }
  for (int step = 0; step < count; ++step) plan_piece(step, ends[step], held, part);
}

void Sequence::plan_piece(int step, int64_t end, std::vector<Held>& held, Part& part) const {
  const SequenceStep& s = steps_[step];
  const Held in = held[step];
  Held& out = held[step + 1];
  if (end <= out.end) return;
  const bool is_last = step + 1 == static_cast<int>(steps_.size());
  Piece piece{step, 0, 0, 0, 0, out.end * s.g.ow * s.g.k, s.g, {}};
  if (!is_last) {
    const int64_t row = s.g.ow * s.g.k;
    const int64_t keep = std::clamp(first_needed(steps_[step + 1].g, held[step + 2].end), out.base, out.end);
    piece.moved = (keep - out.base) * row;
    piece.amount = (out.end - keep) * row;
    out.base = keep;
    part.rows[step + 1] = std::max(part.rows[step + 1], end - out.base);
  }
  piece.to = (out.end - (is_last ? 0 : out.base)) * s.g.ow * s.g.k;
  const int64_t above = out.end * s.g.sh - s.g.top, below = (end - 1) * s.g.sh - s.g.top + s.g.kh;
  piece.from = (std::max<int64_t>(above, 0) - (step == 0 ? 0 : in.base)) * s.g.w * s.g.c;
  piece.g.n = 1;
  piece.g.top = std::max<int64_t>(-above, 0);
  piece.g.bottom = std::max<int64_t>(below - s.g.h, 0);
  piece.g.h = std::min(below, s.g.h) - std::max<int64_t>(above, 0);
  conv_geometry(piece.g);
  piece.blocking = conv_blocking(s.algorithm, piece.g, s.columns, 1);
  part.scratch = std::max(part.scratch, conv_scratch(piece.blocking));
  part.pieces.push_back(piece);
  out.end = end;
}

void Sequence::run_part(const Part& part, const float* image, std::span<const SequenceOperands> operands,
                        float* out, float* memory) const {
  // The memory of each map between; the first and the last are the caller's.
  std::vector<float*> maps(steps_.size() + 1);
  maps[steps_.size()] = out;
  for (size_t map = 1; map < steps_.size(); ++map) {
    maps[map] = memory;
    memory += up(part.rows[map] * steps_[map].g.w * steps_[map].g.c, 64);
  }
  for (const Piece& piece : part.pieces) {
    const SequenceOperands& own = operands[piece.step];
    float* const to = maps[piece.step + 1];
    if (piece.moved > 0) std::copy_n(to + piece.moved, piece.amount, to);
    ConvJob job{piece.g,
                steps_[piece.step].columns,
                piece.blocking,
                own.epilogue,
                (piece.step == 0 ? image : maps[piece.step]) + piece.from,
                own.weight,
                to + piece.to};
    if (own.epilogue.residual) job.epilogue.residual += piece.row;
    conv_alone(steps_[piece.step].kernel, job, memory);
  }
}

void Sequence::run(const float* x, std::span<const SequenceOperands> operands, float* out) const {
  const ConvGeometry &first = steps_.front().g, &last = steps_.back().g;
  const auto parts = static_cast<int64_t>(parts_.size());
  const int64_t pieces = first.n * parts;
  thread_local Scratch scratch;
  float* const memory = scratch.of(memory_ * workers_);
  const auto work = [&](int64_t worker) {
    for (int64_t i = pieces * worker / workers_; i < pieces * (worker + 1) / workers_; ++i)
      run_part(parts_[i % parts], x + i / parts * first.h * first.w * first.c, operands,
               out + i / parts * last.oh * last.ow * last.k, memory + worker * memory_);
  };
  if (workers_ == 1) return work(0);
#pragma omp parallel for num_threads(workers_) schedule(static, 1)
  for (int worker = 0; worker < workers_; ++worker) work(worker);
}

}  // namespace updp
