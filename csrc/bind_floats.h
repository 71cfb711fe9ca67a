// What comes in at the door.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace updp {

using Four = std::array<int64_t, 4>;

// An array of floats: where it begins, and how many elements it has to have.
struct Floats {
  const char* op;
  const char* name;
  uintptr_t address;
  int64_t elements;

  void check() const {
    if (address == 0 && elements > 0) complain("is a null pointer");
    if (address % alignof(float) != 0)
      complain("is at " + std::to_string(address) + ", allowed: multiples of 4");
    if (address + static_cast<uintptr_t>(elements) * sizeof(float) < address)
      complain("reaches beyond the end of memory");
  }
  bool overlaps(const Floats& other) const {
    return address < other.address + other.elements * sizeof(float) &&
           other.address < address + elements * sizeof(float);
  }
  [[noreturn]] void complain(const std::string& what) const {
    throw std::invalid_argument(std::string(op) + ": " + name + " " + what);
  }
};

}  // namespace updp
