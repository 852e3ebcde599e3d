// The row arithmetic with AVX-512.
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"

#define CRATON_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

namespace craton {
namespace {

#include "lanes_avx512.h"
#include "rows_math.h"

}  // namespace

const RowMath avx512_rows = row_math;

}  // namespace craton
#endif
