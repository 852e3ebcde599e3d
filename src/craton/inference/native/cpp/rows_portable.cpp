// The row arithmetic in plain C++: the definition of the result, and what runs where nothing else does.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"

#define CRATON_TARGET

namespace craton {
namespace {

#include "lanes_portable.h"
#include "rows_math.h"

}  // namespace

const RowMath portable_rows = row_math;

}  // namespace craton
