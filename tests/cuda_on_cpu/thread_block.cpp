#include "thread_block.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

Index threadIdx, blockIdx;

namespace cuda_on_cpu {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;

enum class Order { forward, reverse, random };
enum class State { ready, with_lanes, at_barrier, done };

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool valid;
    void perform() const {
        if (valid) {
            std::memcpy(to, from, bytes);
        } else {
            std::memset(to, 0, bytes);
        }
    }
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started;
    State state;
    uint32_t mask;
    void* operands;
    void (*perform)(void* const*);
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> groups;
};

Order order = Order::forward;
std::mt19937 chance;
std::vector<Fiber> fibers;
char* stacks = nullptr;
size_t stack_count = 0;
int thread_count, current, waiting_at_barrier;
jmp_buf caller;
const std::function<void()>* block_body;
std::string failure;
#if defined(__SANITIZE_ADDRESS__)
const void* caller_stack = nullptr;
size_t caller_stack_bytes = 0;
#endif

char* stack_of(int thread) { return stacks + thread * STACK_BYTES; }

[[noreturn]] void leave() {
#if defined(__SANITIZE_ADDRESS__)
    void* unused;
    __sanitizer_start_switch_fiber(&unused, caller_stack, caller_stack_bytes);
#endif
    _longjmp(caller, 1);
}

// Tells the address sanitizer, where it watches, that the stack changes.
void announce(int thread) {
#if defined(__SANITIZE_ADDRESS__)
    void* unused;
    __sanitizer_start_switch_fiber(&unused, stack_of(thread), STACK_BYTES);
#else
    (void)thread;
#endif
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (caller_stack == nullptr) {
        caller_stack = stack;
        caller_stack_bytes = bytes;
    }
#endif
    threadIdx.x = current;
}

// A thread that can go on: of the same warp if there is one, except now and then in random order.
int next_ready() {
    const int warps = thread_count / LANES;
    int warp = current / LANES;
    int first_lane = order == Order::reverse ? LANES - 1 : 0;
    int step = order == Order::reverse ? -1 : 1;
    if (order == Order::random) {
        const unsigned bits = chance();
        warp = bits % 4 == 0 ? bits / 4 % warps : warp;
        first_lane = bits >> 16 & 31;
        step = bits >> 24 & 1 ? 1 : -1;
    }
    for (int w = 0; w < warps; ++w) {
        const int start = ((warp + step * w) % warps + warps) % warps * LANES;
        for (int l = 0; l < LANES; ++l) {
            const int thread = start + ((first_lane + step * l) & (LANES - 1));
            if (fibers[thread].state == State::ready) {
                return thread;
            }
        }
    }
    return -1;
}

void go_on() {
    const int next = next_ready();
    if (next < 0) {
        for (const Fiber& fiber : fibers) {
            if (fiber.state != State::done) {
                fail("threads wait that others will never join");
            }
        }
        leave();
    }
    if (next == current) {
        return;
    }
    Fiber& from = fibers[current];
    current = next;
    if (from.state == State::done || _setjmp(from.resume) == 0) {
        announce(next);
        if (fibers[next].started) {
            _longjmp(fibers[next].resume, 1);
        }
        fibers[next].started = true;
        setcontext(&fibers[next].start);
    }
    arrived();
}

void fiber_main() {
    arrived();
    (*block_body)();
    fibers[current].state = State::done;
    go_on();
}

}  // namespace

void fail(const std::string& message) {
    failure = message;
    leave();
}

void set_thread_order(const std::string& name, unsigned seed) {
    if (name != "forward" && name != "reverse" && name != "random") {
        throw std::invalid_argument("order = '" + name + "': must be forward, reverse or random");
    }
    order = name == "forward" ? Order::forward : name == "reverse" ? Order::reverse : Order::random;
    chance.seed(seed);
}

void run_block(unsigned block, int threads, const std::function<void()>& body) {
    if (threads % LANES != 0) {
        throw std::invalid_argument("a block must be whole warps");
    }
    if (stack_count < static_cast<size_t>(threads)) {
        stack_count = threads;
        stacks = static_cast<char*>(mmap(nullptr, stack_count * STACK_BYTES, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED) {
            throw std::runtime_error("no memory for the stacks");
        }
    }
    thread_count = threads;
    waiting_at_barrier = 0;
    block_body = &body;
    blockIdx.x = block;
    failure.clear();
    fibers.resize(threads);
    for (int thread = 0; thread < threads; ++thread) {
        Fiber& fiber = fibers[thread];
        fiber.started = false;
        fiber.state = State::ready;
        fiber.open_copies.clear();
        fiber.groups.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stack_of(thread);
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
    }
#if defined(__SANITIZE_ADDRESS__)
    caller_stack = nullptr;
    __asan_unpoison_memory_region(stacks, threads * STACK_BYTES);  // the last block's fibers never returned
#endif
    if (_setjmp(caller) == 0) {
        current = 0;
        current = next_ready();
        fibers[current].started = true;
        announce(current);
        setcontext(&fibers[current].start);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    if (!failure.empty()) {
        throw std::runtime_error(failure);
    }
}

void barrier() {
    fibers[current].state = State::at_barrier;
    if (++waiting_at_barrier == thread_count) {
        waiting_at_barrier = 0;
        for (Fiber& fiber : fibers) {
            fiber.state = State::ready;
        }
    }
    go_on();
}

void together(uint32_t mask, void* operands, void (*perform)(void* const*)) {
    const int first = current / LANES * LANES;
    Fiber& own = fibers[current];
    if ((mask >> (current - first) & 1) == 0) {
        fail("a lane executes an instruction whose mask leaves it out");
    }
    own.state = State::with_lanes;
    own.mask = mask;
    own.operands = operands;
    own.perform = perform;
    void* of_lanes[LANES] = {};
    for (int lane = 0; lane < LANES; ++lane) {
        const Fiber& fiber = fibers[first + lane];
        if ((mask >> lane & 1) == 0) {
            continue;
        }
        if (fiber.state != State::with_lanes) {
            go_on();
            return;
        }
        if (fiber.mask != mask || fiber.perform != perform) {
            fail("the lanes of one instruction are at different instructions");
        }
        of_lanes[lane] = fiber.operands;
    }
    perform(of_lanes);
    for (int lane = 0; lane < LANES; ++lane) {
        if (of_lanes[lane] != nullptr) {
            fibers[first + lane].state = State::ready;
        }
    }
    go_on();
}

void copy_start(void* to, const void* from, size_t bytes, bool valid) {
    const Copy copy = {to, from, bytes, valid};
    if (order == Order::reverse || (order == Order::random && chance() % 2 == 0)) {
        copy.perform();
    } else {
        fibers[current].open_copies.push_back(copy);
    }
}

void copies_end_group() {
    Fiber& own = fibers[current];
    own.groups.push_back(std::move(own.open_copies));
    own.open_copies.clear();
}

void copies_wait(size_t pending) {
    auto& groups = fibers[current].groups;
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) {
            copy.perform();
        }
        groups.pop_front();
    }
}

}  // namespace cuda_on_cpu
