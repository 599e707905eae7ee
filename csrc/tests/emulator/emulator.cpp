// The fibers, their scheduler, launches, and as much of the CUDA runtime as the tests need.
#include "emulator.h"

#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <cxxabi.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mesa::emulator {
namespace {

constexpr size_t kPage = 4096, kStack = 256 * 1024;
constexpr size_t kMaxShared = 227 * 1024;  // of a block, on sm_90
constexpr int kMaxThreads = 1024;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Memory between two pages that may not be touched.
unsigned char* guarded(size_t bytes) {
    const size_t length = round_up(bytes, kPage);
    void* const base = mmap(nullptr, length + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    unsigned char* const p = static_cast<unsigned char*>(base) + kPage;
    return mprotect(p, length, PROT_READ | PROT_WRITE) == 0 ? p : nullptr;
}
void free_guarded(unsigned char* p, size_t bytes) { munmap(p - kPage, round_up(bytes, kPage) + 2 * kPage); }

// ---- fibers: one function's call after the other, each on its own stack -------------------------------------------

void fiber_main();

#if defined(__x86_64__)
// Keeps what a function must keep, exchanges the stacks, returns to where the other one was left.
// swapcontext would do too, but for a system call each time.
struct Context {
    void* stack_pointer;
};
extern "C" void mesa_emulator_switch(Context* from, const Context* to);
asm(R"(
.text
.type mesa_emulator_switch, @function
mesa_emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov (%rsi), %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
void switch_to(Context& from, Context& to) { mesa_emulator_switch(&from, &to); }
void prepare(Context& context, unsigned char* stack) {
    void** const top = reinterpret_cast<void**>(stack + kStack);
    top[-2] = reinterpret_cast<void*>(fiber_main);  // with the alignment that a call would leave
    std::fill(top - 8, top - 2, nullptr);
    context.stack_pointer = top - 8;
}
#else
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, unsigned char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, fiber_main, 0);
}
#endif

// ---- the state of the block that runs -----------------------------------------------------------------------------

struct Thread {
    Context context;
    const char* waits_for = "its start";
};

struct Warp {
    uint32_t ready;    // lanes that run or could
    uint64_t priority = random();
    bool backwards = random() % 2;  // the order in which lanes run
    // The instruction at which some lanes have arrived already.
    const char* instruction = "";
    uint32_t mask = 0, arrived = 0;
    void* operands[32] = {};
};

struct Barrier {
    const char* name = "";
    int arrived = 0;
    bool any = false;       // of the predicates that have come so far
    bool any_last = false;  // of all those of the last time: whoever comes again has read it
};

std::vector<Thread> threads;
std::vector<Warp> warps;
Barrier block_barrier;
int self = -1;  // the running thread
int alive;
int mean_stretch;  // of switches until a warp is given another priority
size_t shared_bytes;
unsigned char* shared_end;  // where a guard page begins
std::string kernel_name;
const std::function<void()>* thread_body;
Context main_context;
uint64_t random_state;

Warp& own_warp() { return warps[self / 32]; }
uint32_t own_bit() { return 1u << self % 32; }

void print_deadlock() {
    for (size_t w = 0; w < warps.size(); ++w)
        for (int l = 0; l < 32; ++l) {  // lanes that wait for the same are one line
            uint32_t lanes = 0;
            const char* const waits_for = threads[w * 32 + l].waits_for;
            for (int m = 0; m < 32; ++m)
                if (std::strcmp(threads[w * 32 + m].waits_for, waits_for) == 0) lanes |= 1u << m;
            if (lanes & ((1u << l) - 1)) continue;
            std::fprintf(stderr, "    warp %zu, lanes %08x: %s\n", w, lanes, waits_for);
        }
}

int next_thread() {
    Warp* first = nullptr;
    for (Warp& w : warps)
        if (w.ready && (!first || w.priority > first->priority)) first = &w;
    if (!first) {
        std::fprintf(stderr, "emulator: threads wait for one another:\n");
        print_deadlock();
        fail("deadlock");
    }
    if (random() % mean_stretch == 0) first->priority = random(), first->backwards = random() % 2;
    const int lane = first->backwards ? 31 - __builtin_clz(first->ready) : __builtin_ctz(first->ready);
    return static_cast<int>(first - warps.data()) * 32 + lane;
}

void switch_from(Context& context) {
    const int next = next_thread();
    if (next == self) return;
    self = next;
    threadIdx.x = next;
    switch_to(context, threads[next].context);
}

// Until the thread is made ready again.
void wait(const char* name) {
    threads[self].waits_for = name;
    own_warp().ready &= ~own_bit();
    switch_from(threads[self].context);
}

void fiber_main() {
    (*thread_body)();
    end_thread();
    --alive;
    if (alive) wait("ended");
    switch_to(threads[self].context, main_context);
}

void on_bad_address(int, siginfo_t* info, void*) {
    fail("touches address %p, outside of all arrays, shared memory and its stack", info->si_addr);
}

void set_up() {
    static bool done = false;
    if (done) return;
    done = true;
    shared_end = guarded(round_up(kMaxShared, kPage)) + round_up(kMaxShared, kPage);
    // On a stack of its own: the address may be one past the end of a fiber's.
    stack_t stack{};
    stack.ss_sp = guarded(kStack);
    stack.ss_size = kStack;
    sigaltstack(&stack, nullptr);
    struct sigaction action{};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    const char* const seed = std::getenv("MESA_EMULATE_SEED");
    random_state = seed ? std::strtoull(seed, nullptr, 10) : 1;
}

void run_block() {
    static std::vector<unsigned char*> stacks;
    const int count = blockDim.x;
    while (static_cast<int>(stacks.size()) < count) stacks.push_back(guarded(kStack));
    std::memset(shared_base(), 0xff, shared_end - shared_base());
    block_barrier = {};
    threads.assign(count, {});
    warps.clear();
    for (int t = 0; t < count; t += 32) warps.push_back(Warp{0xffffffff});
    begin_block(count / 32);
    for (int t = 0; t < count; ++t) prepare(threads[t].context, stacks[t]);
    mean_stretch = 1 << (5 + random() % 12);
    alive = count;
    self = -1;
    switch_from(main_context);
    self = -1;
    for (const unsigned char* p = shared_base() + shared_bytes; p < shared_end; ++p)
        if (*p != 0xff) fail("has written past the end of its shared memory");
}

}  // namespace

// ---- the interface ------------------------------------------------------------------------------------------------

void fail(const char* format, ...) {
    std::fflush(stdout);
    std::fprintf(stderr, "emulator: %s, block %u", kernel_name.c_str(), blockIdx.x);
    if (self >= 0) std::fprintf(stderr, ", thread %d (warp %d, lane %d)", self, self / 32, self % 32);
    std::fprintf(stderr, ": ");
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::abort();
}

uint64_t random() {  // splitmix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void* const* meet(const char* name, void* operands, uint32_t mask) {
    Warp& warp = own_warp();
    if (!(mask & own_bit())) fail("%s: the thread is not in its own mask %08x", name, mask);
    if (!warp.arrived) warp.instruction = name, warp.mask = mask;
    else if (std::strcmp(warp.instruction, name) != 0 || warp.mask != mask)
        fail("comes to %s (lanes %08x) while lanes %08x of its warp wait at %s (lanes %08x)", name, mask, warp.arrived,
             warp.instruction, warp.mask);
    warp.operands[self % 32] = operands;
    warp.arrived |= own_bit();
    if (warp.arrived == mask) return warp.operands;
    wait(name);
    return nullptr;
}

void release() {
    own_warp().ready |= own_warp().mask;
    own_warp().arrived = 0;
}

bool barrier(const char* name, bool predicate) {
    Barrier& b = block_barrier;
    if (!b.arrived) b.name = name;
    else if (std::strcmp(b.name, name) != 0) fail("comes to %s, others to %s", name, b.name);
    b.any |= predicate;
    if (++b.arrived < static_cast<int>(threads.size())) {
        wait(name);
    } else {
        for (Warp& w : warps) w.ready = 0xffffffff;
        b.arrived = 0, b.any_last = b.any, b.any = false;
    }
    return b.any_last;
}

unsigned char* shared_base() { return shared_end - round_up(shared_bytes, 1024); }

uint32_t shared_address(const void* p) {
    const ptrdiff_t offset = static_cast<const unsigned char*>(p) - shared_base();
    if (offset < 0 || offset > static_cast<ptrdiff_t>(shared_bytes)) fail("takes the shared address of other memory");
    return kFirstSharedAddress + static_cast<uint32_t>(offset);
}

void* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment) {
    if (address < kFirstSharedAddress || address + bytes > kFirstSharedAddress + shared_bytes)
        fail("shared address %#x (+ %u) is outside of %zu bytes", address, bytes, shared_bytes);
    if (address % alignment) fail("shared address %#x is not aligned to %u", address, alignment);
    return shared_base() + (address - kFirstSharedAddress);
}

// ---- launches -----------------------------------------------------------------------------------------------------

static std::map<const void*, size_t> allowed_shared;

cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > kMaxShared) return cudaErrorInvalidValue;
    allowed_shared[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t run(const void* kernel, const char* name, const cudaLaunchConfig_t& config,
                const std::function<void()>& body) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    const auto allowed = allowed_shared.find(kernel);
    if (config.dynamicSmemBytes > std::max<size_t>(48 * 1024, allowed == allowed_shared.end() ? 0 : allowed->second))
        return cudaErrorInvalidValue;
    if (grid.x == 0 || block.x == 0 || block.x > kMaxThreads || block.x % 32 ||
        grid.y * grid.z * block.y * block.z != 1)
        return cudaErrorInvalidConfiguration;
    set_up();
    const std::unique_ptr<char, void (*)(void*)> readable(abi::__cxa_demangle(name, nullptr, nullptr, nullptr),
                                                          std::free);
    kernel_name = std::string("the kernel of ") + (readable ? readable.get() : name);
    shared_bytes = config.dynamicSmemBytes;
    thread_body = &body;
    gridDim = grid, blockDim = block;
    std::vector<unsigned> order(grid.x);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    for (unsigned b : order) {
        blockIdx.x = b;
        run_block();
    }
    return cudaSuccess;
}

}  // namespace mesa::emulator

// ---- the CUDA runtime ---------------------------------------------------------------------------------------------

namespace {

using namespace mesa::emulator;

// An array ends at a page that may not be touched, but for the bytes up to a multiple of 16, which must keep their
// value.
struct Allocation {
    unsigned char* pages;
    size_t size;
};
std::map<void*, Allocation> allocations;
constexpr unsigned char kUntouched = 0xa5;

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, size_t size) {
    const size_t padded = round_up(std::max<size_t>(size, 1), 16);
    unsigned char* const pages = guarded(padded);
    if (!pages) return cudaErrorMemoryAllocation;
    unsigned char* const start = pages + round_up(padded, kPage) - padded;
    std::memset(start + size, kUntouched, padded - size);
    allocations[start] = {pages, size};
    *p = start;
    return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    const auto found = allocations.find(p);
    if (found == allocations.end()) return cudaErrorInvalidValue;
    const Allocation a = found->second;
    const unsigned char* const start = static_cast<unsigned char*>(p);
    for (size_t i = a.size; i < round_up(std::max<size_t>(a.size, 1), 16); ++i)
        if (start[i] != kUntouched)
            fail("(or an earlier one) has written past the end of an array of %zu bytes", a.size);
    free_guarded(a.pages, round_up(std::max<size_t>(a.size, 1), 16));
    allocations.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    if (bytes) std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    if (bytes) std::memset(p, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "refused by the emulator"; }

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

// MESA_EMULATE_CAPABILITY=80 makes the launchers choose as on an older device than sm_90.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const char* const text = std::getenv("MESA_EMULATE_CAPABILITY");
    const int capability = text ? std::atoi(text) : 90;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; return cudaSuccess;
        case cudaDevAttrMultiProcessorCount: *value = 4; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kMaxShared; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}

cudaError_t cudaEventCreate(cudaEvent_t* e) { return *e = reinterpret_cast<cudaEvent_t>(new double), cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete reinterpret_cast<double*>(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    *reinterpret_cast<double*>(e) = now_ms();
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = static_cast<float>(*reinterpret_cast<double*>(to) - *reinterpret_cast<double*>(from));
    return cudaSuccess;
}

}  // extern "C"
