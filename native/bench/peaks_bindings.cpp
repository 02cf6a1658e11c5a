#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "peaks.h"

namespace nb = nanobind;

namespace pellucid {

void bind_peaks(nb::module_& module) {
    module.def("peak_isas", &peak_isas,
               "Instruction sets that peaks can be measured with here, widest first; amx has no float32 peak.");
    module.def("measure_read_bandwidth", &measure_read_bandwidth, nb::arg("threads"), nb::arg("bytes") = 128 << 20,
               nb::arg("seconds") = 0.08, nb::call_guard<nb::gil_scoped_release>(),
               "Bytes a second that the threads read together from a buffer of that many bytes.\n"
               "Raises ValueError (too few threads or bytes) and MemoryError.");
    module.def("measure_int8_peak", &measure_int8_peak, nb::arg("threads"), nb::arg("isa"), nb::arg("seconds") = 0.03,
               nb::call_guard<nb::gil_scoped_release>(),
               "int8 operations a second from registers; a multiply-add is two. Raises ValueError.");
    module.def("measure_f32_peak", &measure_f32_peak, nb::arg("threads"), nb::arg("isa"), nb::arg("seconds") = 0.03,
               nb::call_guard<nb::gil_scoped_release>(),
               "float32 operations a second from registers; a multiply-add is two. Raises ValueError.");
}

}  // namespace pellucid
