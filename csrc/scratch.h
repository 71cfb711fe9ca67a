// Memory of a thread that calls: kept from call to call, so that only the first and larger ones allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace updp {

class Scratch {
 public:
  float* of(int64_t elements) {
    if (elements > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(
          ::operator new[](static_cast<size_t>(elements) * sizeof(float), std::align_val_t{kAlignment})));
      size_ = elements;
    }
    return memory_.get();
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Delete {
    void operator()(float* pointer) const { ::operator delete[](pointer, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<float[], Delete> memory_;
  int64_t size_ = 0;
};

}  // namespace updp
