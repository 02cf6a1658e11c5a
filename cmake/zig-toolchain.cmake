# The compiler of the PyPI package ziglang; PELLUCID_ZIG is the path of its executable.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES PELLUCID_ZIG)
set(CMAKE_CXX_COMPILER ${PELLUCID_ZIG} c++)

# Without a CPU named, zig compiles for the one it runs on, and adds undefined-behaviour traps of its own.
if(CMAKE_HOST_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|aarch64|arm64)$")
    set(CMAKE_CXX_FLAGS_INIT "-mcpu=baseline -fno-sanitize=undefined")
else()
    set(CMAKE_CXX_FLAGS_INIT "-fno-sanitize=undefined")
endif()

# CMAKE_AR takes a path alone, and `ar` is an argument of zig.
set(CMAKE_CXX_ARCHIVE_CREATE "\"${PELLUCID_ZIG}\" ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_APPEND "\"${PELLUCID_ZIG}\" ar q <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "\"${PELLUCID_ZIG}\" ranlib <TARGET>")
