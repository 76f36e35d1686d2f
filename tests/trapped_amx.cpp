// Stands in for csrc/permission.cpp where a processor lacks AMX: its instructions, which raise a signal there, are decoded
// and carried out on emulated registers. So the very machine code that other processors run is tested.
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulated_amx.h"
#include "kernels.h"

namespace structmat {
namespace {

EmulatedAmx registers;  // the driver has one thread

// By their numbers in an instruction.
constexpr int general[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction with a VEX prefix of three bytes, and what it names.
struct Instruction {
  int prefix, opcode;  // the prefix that is folded in: none, 66, F3 or F2, by number
  int reg, rm, other;
  bool in_memory;
  int64_t address, stride;  // stride: the index, scaled
  int64_t length;
};

bool decode(const greg_t* values, Instruction& found) {
  const unsigned char *begin = reinterpret_cast<const unsigned char*>(values[REG_RIP]), *p = begin;
  if (*p++ != 0xC4) return false;
  const int first = *p++, second = *p++;
  const int r = !(first & 0x80), x = !(first & 0x40), b = !(first & 0x20);
  if ((first & 0x1F) != 2 || (second & 0x84)) return false;  // instructions of 0F 38, with W0 and L0
  found.prefix = second & 3, found.other = ~(second >> 3) & 15, found.opcode = *p++;
  const int mode = *p >> 6, rm = *p & 7;
  found.reg = (*p++ >> 3 & 7) | r << 3, found.rm = rm | b << 3;
  found.in_memory = mode != 3, found.address = found.stride = 0;
  bool is_relative = false;
  if (found.in_memory) {
    int base = found.rm;
    if (rm == 4) {
      const int scale = *p >> 6, index = (*p >> 3 & 7) | x << 3;
      base = (*p++ & 7) | b << 3;
      if (index != 4) found.stride = int64_t(values[general[index]]) << scale;
    }
    is_relative = mode == 0 && rm == 5;
    const bool has_base = !is_relative && !(mode == 0 && rm == 4 && (base & 7) == 5);
    if (has_base) found.address = values[general[base]];
    if (mode == 1) {
      found.address += static_cast<signed char>(*p++);
    } else if (mode == 2 || !has_base) {
      int32_t displacement;
      std::memcpy(&displacement, p, sizeof displacement);
      found.address += displacement, p += sizeof displacement;
    }
  }
  found.length = p - begin;
  if (is_relative) found.address += reinterpret_cast<int64_t>(p);
  return true;
}

bool carry_out(const Instruction& s) {
  enum { none, _66, F3, F2 };
  void* memory = reinterpret_cast<void*>(s.address);
  if (s.opcode == 0x49 && s.prefix == none && s.in_memory && s.reg == 0) {
    AmxConfiguration wanted;
    std::memcpy(&wanted, memory, sizeof wanted);
    registers.configure(wanted);
  } else if (s.opcode == 0x49 && s.prefix == none && !s.in_memory && s.reg == 0 && s.rm == 0) {
    registers.release();
  } else if (s.opcode == 0x49 && s.prefix == F2 && !s.in_memory && s.rm == 0) {
    registers.clear(s.reg);
  } else if (s.opcode == 0x4B && s.prefix == F2 && s.in_memory) {
    registers.load(s.reg, memory, s.stride);
  } else if (s.opcode == 0x4B && s.prefix == F3 && s.in_memory) {
    registers.store(s.reg, memory, s.stride);
  } else if (s.opcode == 0x5C && s.prefix == F3 && !s.in_memory) {
    registers.multiply(s.reg, s.rm, s.other);
  } else {
    return false;
  }
  return true;
}

void on_unknown_instruction(int, siginfo_t*, void* context) {
  greg_t* values = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction found;
  if (!decode(values, found) || !carry_out(found)) std::abort();
  values[REG_RIP] += found.length;
}

}  // namespace

bool amx_permitted() {
  struct sigaction action = {};
  action.sa_sigaction = on_unknown_instruction, action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr) == 0;
}

}  // namespace structmat
