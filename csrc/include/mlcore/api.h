// What every function of the C API shares: visibility, the status codes and the text of the last error.
#ifndef MLCORE_API_H_
#define MLCORE_API_H_

#include "mlcore/dlpack.h"

#if defined(_WIN32)
#define MLC_EXPORT __declspec(dllexport)
#else
#define MLC_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
#define MLC_API extern "C" MLC_EXPORT
#else
#define MLC_API MLC_EXPORT
#endif

// Every function returns one of these; nothing is thrown across the API and nothing is written unless MLC_OK is returned.
typedef enum {
  MLC_OK = 0,
  MLC_INVALID_ARGUMENT = 1,  // a shape, stride, dtype, device or value breaks the contract
  MLC_UNSUPPORTED = 2,       // the contract allows it, this build or this machine can't do it
  MLC_RUNTIME_ERROR = 3,
} mlc_status;

// The calling thread's last error: one line that names the op, the argument, the rule and the value. Never NULL.
MLC_API const char* mlc_last_error(void);

#endif  // MLCORE_API_H_
