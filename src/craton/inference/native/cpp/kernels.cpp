#include "kernels.h"

#include <atomic>
#include <cstring>

namespace craton {
namespace {

const Kernels* const kTables[] = {
#if defined(__x86_64__)
    &avx512vnni_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};

const Kernels* best() {
    for (const Kernels* table : kTables) {
        if (table->supported()) return table;
    }
    return &portable_kernels;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = selected.load(std::memory_order_acquire);
    if (!table) {
        table = best();
        selected.store(table, std::memory_order_release);
    }
    return *table;
}

bool select_kernels(const char* name) {
    for (const Kernels* table : kTables) {
        if (strcmp(table->name, name) == 0 && table->supported()) {
            selected.store(table, std::memory_order_release);
            return true;
        }
    }
    return false;
}

}  // namespace craton
