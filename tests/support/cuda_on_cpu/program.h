// What follows a .cu file in a program that runs it: its dynamic shared memory, and, for a program, main().
#pragma once

constexpr unsigned MOST_SHARED = 227 << 10;                 // bytes a block may have on the largest cards
constexpr unsigned BEYOND = 1024;                           // bytes beyond them, which must stay unchanged
#ifdef SANITIZED
float4 dynamic_shared[(MOST_SHARED + BEYOND) / 16];
#else
thread_local float4 dynamic_shared[(MOST_SHARED + BEYOND) / 16];
#endif

namespace cuda_on_cpu {

// Bytes that are NaN as float64, float32, float16 and bfloat16, and -1 as an int.
constexpr int NAN_BYTE = 0xff;

#if defined(SANITIZED)
static void fill_shared_memory(unsigned dynamic_bytes) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, sizeof dynamic_shared);
    memset(dynamic_shared, NAN_BYTE, dynamic_bytes);
    char* end = reinterpret_cast<char*>(dynamic_shared) + dynamic_bytes;
    ASAN_POISON_MEMORY_REGION(end, sizeof dynamic_shared - dynamic_bytes);
#else
    (void)dynamic_bytes;                                    // races are found with any contents
#endif
}
static bool wrote_past_shared_memory(unsigned) { return false; }
#else

// The thread-local variables of this program are exactly its __shared__ variables.
static char* shared_begin;
static size_t shared_size;

static int find_shared_memory(dl_phdr_info* info, size_t, void*) {
    const char* here = reinterpret_cast<const char*>(&find_shared_memory);
    bool mine = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& part = info->dlpi_phdr[i];
        const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + part.p_vaddr);
        mine |= part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz;
    }
    for (int i = 0; mine && i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_TLS)
            shared_begin = static_cast<char*>(info->dlpi_tls_data), shared_size = info->dlpi_phdr[i].p_memsz;
    return mine;
}

static void fill_shared_memory(unsigned dynamic_bytes) {
    char* dynamic = reinterpret_cast<char*>(dynamic_shared);
    *static_cast<volatile char*>(dynamic) = 0;              // the first touch allocates it
    dl_iterate_phdr(find_shared_memory, nullptr);           // each thread of the process has its own
    if (!shared_begin) return;
    memset(shared_begin, NAN_BYTE, dynamic - shared_begin);
    char* after = dynamic + sizeof dynamic_shared;
    memset(after, NAN_BYTE, shared_begin + shared_size - after);
    memset(dynamic, NAN_BYTE, dynamic_bytes + BEYOND);
}

static bool wrote_past_shared_memory(unsigned dynamic_bytes) {
    const unsigned char* beyond = reinterpret_cast<unsigned char*>(dynamic_shared) + dynamic_bytes;
    for (unsigned i = 0; i < BEYOND; i++) if (beyond[i] != NAN_BYTE) return true;
    return false;
}
#endif

}  // namespace cuda_on_cpu

// A library's function for each kernel: cuda_on_cpu_run_NAME(launch, arguments, stacks) returns an error's text or nullptr.
#define KERNEL(name) \
    extern "C" const char* cuda_on_cpu_run_##name(const cuda_on_cpu::Launch* launch, void** arguments, char* stacks) { \
        cuda_on_cpu::stacks = stacks; \
        return cuda_on_cpu::launch(*launch, name, arguments); \
    }

// A program's main(): runs the launch that a file describes, and writes the resulting arrays to the file.
//     kernel, grid, block, shared, order, and for each argument its kind (s scalar, a array), size and bytes
#define PROGRAM(...) \
    struct Named { const char* name; const char* (*run)(const cuda_on_cpu::Launch*, void**, char*); }; \
    static const Named kernels[] = {__VA_ARGS__}; \
    int main(int count, char** words) { \
        if (count != 2) return fprintf(stderr, "usage: %s LAUNCH\n", words[0]), 2; \
        return cuda_on_cpu_main(words[1], kernels, sizeof kernels / sizeof *kernels); \
    }

template <class Named> int cuda_on_cpu_main(const char* path, const Named* kernels, size_t how_many) {
    FILE* file = fopen(path, "r+b");
    char name[256];
    cuda_on_cpu::Launch launch;
    int count;
    if (!file || fread(name, sizeof name, 1, file) != 1 || fread(&launch, sizeof launch, 1, file) != 1
        || fread(&count, sizeof count, 1, file) != 1 || count > 64) return fprintf(stderr, "%s: no launch\n", path), 2;
    void* held[64];
    void* arguments[64];
    long long sizes[64], places[64];
    for (int i = 0; i < count; i++) {
        long long head[2];                                  // 1 for an array, else 0; its size in bytes
        if (fread(head, sizeof head, 1, file) != 1) return fprintf(stderr, "%s: cut short\n", path), 2;
        sizes[i] = head[0] ? head[1] : -1, places[i] = ftell(file);
        held[i] = malloc(size_t(head[1]));                  // a separate block, so that a sanitizer knows its ends
        if (head[1] && fread(held[i], size_t(head[1]), 1, file) != 1) return fprintf(stderr, "%s: cut short\n", path), 2;
        arguments[i] = head[0] ? static_cast<void*>(&held[i]) : held[i];
    }
    char* stacks = static_cast<char*>(mmap(nullptr, cuda_on_cpu::MOST * cuda_on_cpu::STACK, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t k = 0; k < how_many; k++) {
        if (strcmp(kernels[k].name, name)) continue;
        const char* error = kernels[k].run(&launch, arguments, stacks);
        if (error) return fprintf(stderr, "%s\n", error), 3;
        for (int i = 0; i < count; i++)
            if (sizes[i] > 0 && (fseek(file, places[i], SEEK_SET) || fwrite(held[i], size_t(sizes[i]), 1, file) != 1))
                return fprintf(stderr, "%s: cannot be written\n", path), 2;
        for (int i = 0; i < count; i++) free(held[i]);
        return fclose(file);
    }
    return fprintf(stderr, "%s: no kernel %s\n", path, name), 2;
}
