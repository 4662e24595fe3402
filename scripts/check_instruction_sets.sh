#!/bin/sh
# Usage: check_instruction_sets.sh libwmha.so
#
# Passes if only functions of the namespaces of an instruction set hold AVX instructions. An inline function compiled with AVX
# flags that the linker took for plain code, too, would end the process on a CPU without AVX.
set -eu
objdump --disassemble --no-show-raw-insn "$1" | awk '
  /^[0-9a-f]+ <.*>:$/ { name = $2; allowed = name ~ /AVX(2|512)|AMX/; functions += 1; chosen += allowed }
  !allowed && $2 ~ /^v[a-z]/ && !(name in seen) { seen[name] = 1; wrong += 1; print "AVX instruction in " name " " $0 }
  END {
    print functions " functions, " chosen + 0 " of them in the namespaces of an instruction set"
    exit wrong > 0 || chosen == 0
  }'
