// The floating-point state of a thread: round to nearest, exceptions masked; restores what was there.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace pellucid {

enum class Subnormals { kKept, kFlushed };

class FloatState {
  public:
#if defined(__x86_64__) || defined(_M_X64)
    explicit FloatState(Subnormals subnormals) : saved_(_mm_getcsr()) {
        _mm_setcsr(subnormals == Subnormals::kFlushed ? 0x1f80u | 0x8040u : 0x1f80u);
    }
    ~FloatState() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#else
    explicit FloatState(Subnormals) {}
    ~FloatState() {}
#endif
};

}  // namespace pellucid
