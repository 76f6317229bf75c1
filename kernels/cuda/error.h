// error.h - the one line that kv_cuda_error() gives, kept per thread.
#pragma once

namespace kv {

void clear_error();
// printf-style; returns status.
int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace kv
