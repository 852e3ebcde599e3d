// The row arithmetic with AVX2.
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"

#define CRATON_TARGET __attribute__((target("avx2,fma,f16c")))

namespace craton {
namespace {

#include "lanes_avx2.h"
#include "rows_math.h"

}  // namespace

const RowMath avx2_rows = row_math;

}  // namespace craton
#endif
