// The extension module mlcore._C: every CPU row of kernels.inc, the table itself, and what the process runs on.
#include <pybind11/stl.h>

#include "core/cpu_features.h"
#include "core/machine.h"
#include "core/parallel.h"
#include "mlcore/mlcore.h"
#include "python/bind_function.h"
#include "python/watch.h"

namespace py = pybind11;

namespace {

struct Row {
  const char *op, *pass, *backend, *dtypes;
};
constexpr Row kTable[] = {
#define MLC_CPU(op, pass, dtypes) {#op, #pass, "cpu", dtypes},
#define MLC_CUDA(op, pass, dtypes) {#op, #pass, "cuda", dtypes},
#define MLC_TRITON(op, pass, dtypes) {#op, #pass, "triton", dtypes},
#include "mlcore/kernels.inc"
};

void bind_kernels(py::module_& m, mlcore::python::For caller) {
#define MLC_CPU(op, pass, dtypes) mlcore::python::bind<&mlc_##op##_##pass>(m, #op "_" #pass, caller);
#define MLC_CPU_HELPER(op, name) mlcore::python::bind<&mlc_##op##_##name>(m, #op "_" #name, caller);
#include "mlcore/kernels.inc"
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_used()) {
  m.doc() = "mlcore's CPU kernels. Use mlcore.ops: these raw functions know neither autograd nor torch.compile.";
  bind_kernels(m, mlcore::python::For::anyone);
  py::module_ launch = m.def_submodule("launch", "The same functions for mlcore's launchers, which run below autograd.");
  bind_kernels(launch, mlcore::python::For::launchers);
  mlcore::python::bind_watch(m);
  m.def(
      "table",
      [] {
        std::vector<std::tuple<const char*, const char*, const char*, const char*>> rows;
        for (const Row& r : kTable) rows.emplace_back(r.op, r.pass, r.backend, r.dtypes);
        return rows;
      },
      "Rows (op, pass, backend, dtypes) of kernels.inc.");
  m.def("isa", [] { return mlcore::name_of(mlcore::current_isa()); }, "The ISA level that the kernels use now.");
  m.def("best_isa", [] { return mlcore::name_of(mlcore::best_isa()); }, "The highest ISA level that this machine has.");
  m.def("set_isa", &mlcore::set_isa, py::arg("name"), "Forces a level; \"\" returns to the default. Not while kernels run.");
  m.def("allow", &mlcore::allow, py::arg("extension"), py::arg("on"),
        "Lets kernels use \"vnni\" or \"vpopcntdq\" where the machine has it (the default), or not. Not while kernels run.");
  m.def("avx512_is_emulated", &mlcore::avx512_is_emulated);
  m.def(
      "num_threads",
      [] {
        mlcore::python::adopt_thread_count();
        return mlcore::num_threads();
      },
      "Threads that a kernel called from this thread would use.");
  m.def("fma_peak_gflops", &mlcore::fma_peak_gflops, py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(), "Measured fp32 FMA rate of the current ISA level in GFLOP/s.");
  m.def("_force_pointer_path", &mlcore::python::force_pointer_path);
  py::register_local_exception<mlcore::Error>(m, "Error", PyExc_RuntimeError);
}
