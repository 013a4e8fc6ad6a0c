// Threads of the OpenMP runtime that PyTorch has loaded. Linking one of our own would bring a second runtime into the
// process, with threads that compete with the first one's. All of them (libgomp, libomp, libiomp5) export the entry
// point that GCC compiles `#pragma omp parallel` to, so its address, handed over once, is enough.
#include "kernels.h"

namespace dpo_kernels {
namespace {

OpenMP openmp;

struct Call {
  void (*fn)(void*, int, int);
  void* data;
};

void run_member(void* call) {
  const Call& c = *static_cast<const Call*>(call);
  c.fn(c.data, openmp.get_thread_num(), openmp.get_num_threads());
}

}  // namespace

void set_openmp(const OpenMP& functions) { openmp = functions; }

void run_team(void (*fn)(void* data, int rank, int size), void* data, int threads) {
  if (threads > 1 && openmp.parallel) {
    Call call{fn, data};
    openmp.parallel(run_member, &call, static_cast<unsigned>(threads), 0);
  } else {
    fn(data, 0, 1);
  }
}

}  // namespace dpo_kernels
