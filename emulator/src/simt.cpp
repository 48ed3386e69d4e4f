// The machine of `simt.h`, and its one entry for the host.
#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace simt {
thread_local uint3 thread, block, block_size, grid_size;

namespace {
constexpr size_t STACK_BYTES = 128 << 10;

// Where some wait until all have come.
struct Barrier {
    unsigned members = 0, waiting = 0, round = 0;

    void release_if_all() {
        if (waiting > 0 && waiting == members) waiting = 0, round++;
    }
};

struct Fiber {
    std::unique_ptr<uint8_t[]> stack{new uint8_t[STACK_BYTES]};
    jmp_buf state;
    bool is_done = true;
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    std::vector<uint32_t[32][16]> rooms;
    Barrier all;
    std::vector<uint8_t> shared;
    jmp_buf scheduler;
    ucontext_t context, back;
    unsigned current = 0;
    Unpacked call = nullptr;
    void *kernel = nullptr;
    void **arguments = nullptr;
};
thread_local Machine machine;

std::map<std::string, std::pair<void *, Unpacked>> &kernels() {
    static std::map<std::string, std::pair<void *, Unpacked>> all;
    return all;
}

void yield() {
    Fiber &own = machine.fibers[machine.current];
    if (_setjmp(own.state) == 0) _longjmp(machine.scheduler, 1);
}

void wait(Barrier &barrier) {
    barrier.waiting++;
    unsigned round = barrier.round;
    barrier.release_if_all();
    while (barrier.round == round) yield();
}

void leave(Barrier &barrier) {
    barrier.members--;
    barrier.release_if_all();
}

// The whole life of a fiber. Its first run only notes where it begins.
void live() {
    Fiber &own = machine.fibers[machine.current];
    if (_setjmp(own.state) == 0) {
        swapcontext(&machine.context, &machine.back);
    }
    machine.call(machine.kernel, machine.arguments);
    machine.fibers[machine.current].is_done = true;
    leave(machine.warps[machine.current / 32]);
    leave(machine.all);
    _longjmp(machine.scheduler, 1);
}

void begin(unsigned i) {
    machine.current = i;
    Fiber &fiber = machine.fibers[i];
    fiber.is_done = false;
    getcontext(&machine.context);
    machine.context.uc_stack.ss_sp = fiber.stack.get();
    machine.context.uc_stack.ss_size = STACK_BYTES;
    machine.context.uc_link = nullptr;
    makecontext(&machine.context, live, 0);
    swapcontext(&machine.back, &machine.context);
}

// Lets every fiber run in turn until all are done.
void run_block() {
    unsigned threads = (unsigned)machine.fibers.size();
    machine.all = Barrier{threads, 0, 0};
    for (unsigned w = 0; w < machine.warps.size(); w++) machine.warps[w] = Barrier{std::min(32u, threads - 32 * w), 0, 0};
    for (unsigned i = 0; i < threads; i++) begin(i);
    volatile unsigned next = 0;
    volatile unsigned idle = 0;
    _setjmp(machine.scheduler);
    while (idle < threads) {
        unsigned i = next;
        next = (i + 1) % threads;
        if (machine.fibers[i].is_done) {
            idle = idle + 1;
            continue;
        }
        idle = 0;
        machine.current = i;
        thread = uint3{i, 0, 0};
        _longjmp(machine.fibers[i].state, 1);
    }
}
} // namespace

Kernel::Kernel(const char *name, void *kernel, Unpacked call) { kernels()[name] = {kernel, call}; }

uint8_t *shared_memory() { return machine.shared.data(); }

void wait_for_block() { wait(machine.all); }

void wait_for_warp() { wait(machine.warps[machine.current / 32]); }

uint32_t (*exchange())[16] { return machine.rooms[machine.current / 32]; }
} // namespace simt

// Runs a kernel; `arguments` are pointers to its arguments, as for cuLaunchKernel. 0, or 1 when there is no such kernel.
extern "C" int simt_launch(const char *name, const uint32_t grid[3], uint32_t threads, uint32_t shared_bytes, void **arguments) {
    using namespace simt;
    auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    machine.kernel = found->second.first, machine.call = found->second.second, machine.arguments = arguments;
    if (machine.fibers.size() != threads) {
        machine.fibers = std::vector<Fiber>(threads);
        machine.warps.resize((threads + 31) / 32);
        machine.rooms = std::vector<uint32_t[32][16]>((threads + 31) / 32);
    }
    // what a block finds in shared memory is nothing it may count on
    machine.shared.assign(shared_bytes, 0xff);
    block_size = uint3{threads, 1, 1}, grid_size = uint3{grid[0], grid[1], grid[2]};
    for (uint32_t z = 0; z < grid[2]; z++)
        for (uint32_t y = 0; y < grid[1]; y++)
            for (uint32_t x = 0; x < grid[0]; x++) {
                block = uint3{x, y, z};
                run_block();
            }
    return 0;
}

#include "kernels.cu"
