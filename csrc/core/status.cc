#include "core/status.h"

namespace mlcore {
namespace {
thread_local std::string last_error;
}

void set_last_error(const char* text) noexcept {
  try {
    last_error = text;
  } catch (...) {
    last_error.clear();
  }
}

}  // namespace mlcore

const char* mlc_last_error(void) { return mlcore::last_error.c_str(); }
