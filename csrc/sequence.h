// A run of convolutions, each the input of the next, done strip by strip: a few rows of the last map, and of
// the maps in front of it the rows that these need. What lies between stays in the second cache and is never
// a whole map.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "conv.h"

namespace updp {

// One convolution of the run, on whole maps: its geometry with oh and ow.
struct SequenceStep {
  ConvKernel kernel;
  std::string_view algorithm;
  ConvGeometry g;
  ConvColumns columns;
};

// What a step is given in a call. A residual is one image, the same for all.
struct SequenceOperands {
  const float* weight;
  ConvEpilogue epilogue;
};

class Sequence {
 public:
  // Plans for so many threads. Throws std::invalid_argument where a step does not fit the one before it.
  Sequence(std::vector<SequenceStep> steps, int threads);

  // The same bits for every number of threads.
  void run(const float* x, std::span<const SequenceOperands> operands, float* out) const;

 private:
  // Rows of a map that are there: from `base`, which is where its memory begins, up to `end`.
  struct Held {
    int64_t base, end;
  };
  // Some rows of one step. Places are elements from where a map begins, or from where its memory does.
  struct Piece {
    int step;
    int64_t from, to;  // in the map that is read, and in the one that is written
    int64_t moved,
        amount;   // first, of the map that is written: the rows that are still needed go to its beginning
    int64_t row;  // of the whole map that is written: its first element
    ConvGeometry g;
    ConvBlocking blocking;
  };
  // Rows of the last map that one thread does.
  struct Part {
    std::vector<Piece> pieces;
    std::vector<int64_t> rows;  // of memory that each map between takes
    int64_t scratch;
  };

  Part plan(int64_t begin, int64_t end, int64_t strip) const;
  std::vector<Held> needed(int64_t begin) const;
  void plan_strip(int64_t end, std::vector<Held>& held, Part& part) const;
  void plan_piece(int step, int64_t end, std::vector<Held>& held, Part& part) const;
  int64_t memory(const Part& part) const;
  void run_part(const Part& part, const float* image, std::span<const SequenceOperands> operands, float* out,
                float* memory) const;

  std::vector<SequenceStep> steps_;
  std::vector<Part> parts_;  // of an image
  int workers_;
  int64_t memory_;  // elements that a thread needs
};

}  // namespace updp
