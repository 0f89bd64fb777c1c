// A CUDA thread block on one CPU thread: every thread of the block is a fiber with a stack of its own, which runs
// until it must wait for others. The order in which waiting threads go on is the test's to choose, so a missing
// barrier shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct Index {
    unsigned x;
};
extern Index threadIdx, blockIdx;

namespace cuda_on_cpu {

constexpr int LANES = 32;

// forward, reverse: one warp runs as far as it can before the next; random: any thread that can go on, by `seed`.
// Asynchronous copies happen as late as their wait allows (forward), at once (reverse), or either (random).
void set_thread_order(const std::string& order, unsigned seed);

// Runs body() as each of `threads` threads. Throws std::runtime_error where a barrier is not reached by all, or lanes
// of one instruction are not at the same instruction.
void run_block(unsigned block, int threads, const std::function<void()>& body);

[[noreturn]] void fail(const std::string& message);  // ends the block: run_block throws

void barrier();  // of all threads of the block

// An instruction that the lanes of `mask` execute together. Each brings the address of its operands; the last to come
// runs perform(operands of all 32 lanes, null outside the mask).
void together(uint32_t mask, void* operands, void (*perform)(void* const* of_lanes));

void copy_start(void* to, const void* from, size_t bytes, bool valid);
void copies_end_group();
void copies_wait(size_t pending);

}  // namespace cuda_on_cpu
