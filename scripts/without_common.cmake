# llama.cpp's project() reads this. The library of its own programs, a third of what there is to compile, is of no use
# here, and llama-cpp-python asks for it in the cache, which a plain variable hides (CMake's policy CMP0077).
set(LLAMA_BUILD_COMMON OFF)
