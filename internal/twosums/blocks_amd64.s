#include "textflag.h"

// The constants of SHA-256 (FIPS 180-4, 4.2.2), each two in one line.
DATA k<>+0(SB)/8, $0x71374491428a2f98
DATA k<>+8(SB)/8, $0xe9b5dba5b5c0fbcf
DATA k<>+16(SB)/8, $0x59f111f13956c25b
DATA k<>+24(SB)/8, $0xab1c5ed5923f82a4
DATA k<>+32(SB)/8, $0x12835b01d807aa98
DATA k<>+40(SB)/8, $0x550c7dc3243185be
DATA k<>+48(SB)/8, $0x80deb1fe72be5d74
DATA k<>+56(SB)/8, $0xc19bf1749bdc06a7
DATA k<>+64(SB)/8, $0xefbe4786e49b69c1
DATA k<>+72(SB)/8, $0x240ca1cc0fc19dc6
DATA k<>+80(SB)/8, $0x4a7484aa2de92c6f
DATA k<>+88(SB)/8, $0x76f988da5cb0a9dc
DATA k<>+96(SB)/8, $0xa831c66d983e5152
DATA k<>+104(SB)/8, $0xbf597fc7b00327c8
DATA k<>+112(SB)/8, $0xd5a79147c6e00bf3
DATA k<>+120(SB)/8, $0x1429296706ca6351
DATA k<>+128(SB)/8, $0x2e1b213827b70a85
DATA k<>+136(SB)/8, $0x53380d134d2c6dfc
DATA k<>+144(SB)/8, $0x766a0abb650a7354
DATA k<>+152(SB)/8, $0x92722c8581c2c92e
DATA k<>+160(SB)/8, $0xa81a664ba2bfe8a1
DATA k<>+168(SB)/8, $0xc76c51a3c24b8b70
DATA k<>+176(SB)/8, $0xd6990624d192e819
DATA k<>+184(SB)/8, $0x106aa070f40e3585
DATA k<>+192(SB)/8, $0x1e376c0819a4c116
DATA k<>+200(SB)/8, $0x34b0bcb52748774c
DATA k<>+208(SB)/8, $0x4ed8aa4a391c0cb3
DATA k<>+216(SB)/8, $0x682e6ff35b9cca4f
DATA k<>+224(SB)/8, $0x78a5636f748f82ee
DATA k<>+232(SB)/8, $0x8cc7020884c87814
DATA k<>+240(SB)/8, $0xa4506ceb90befffa
DATA k<>+248(SB)/8, $0xc67178f2bef9a3f7
GLOBL k<>(SB), RODATA|NOPTR, $256

// The order of the bytes of four big-endian words, for PSHUFB.
DATA bigendian<>+0(SB)/8, $0x0405060700010203
DATA bigendian<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL bigendian<>(SB), RODATA|NOPTR, $16

// The registers:
//
//	AX      the constants
//	SI DX   where the bytes are, and how many blocks are left
//	X0      message and constants of two rounds: SHA256RNDS2 has it there
//	X1 X2   state of a, as SHA256RNDS2 has it: words a b e f, words c d g h
//	X3 X4   state of b
//	X5-X8   16 words of the message
//	X9      for one moment
//	X10     bigendian
//	X11-X14 the states before the block

// LOAD brings words a to h of a state into the order of SHA256RNDS2.
#define LOAD(p, abef, cdgh) \
	MOVOU   0(p), abef      \
	MOVOU   16(p), cdgh     \
	PSHUFD  $0xb1, abef, abef \
	PSHUFD  $0x1b, cdgh, cdgh \
	MOVO    abef, X9        \
	PALIGNR $8, cdgh, abef  \
	PBLENDW $0xf0, X9, cdgh

// STORE brings them back.
#define STORE(p, abef, cdgh) \
	PSHUFD  $0x1b, abef, abef \
	PSHUFD  $0xb1, cdgh, cdgh \
	MOVO    abef, X9         \
	PBLENDW $0xf0, cdgh, abef \
	PALIGNR $8, X9, cdgh     \
	MOVOU   abef, 0(p)       \
	MOVOU   cdgh, 16(p)

// INPUT is four words of the message.
#define INPUT(i, m) \
	MOVOU  (i*16)(SI), m \
	PSHUFB X10, m

// FIRST and SECOND are two rounds each, of both states.
#define FIRST(i, m) \
	MOVO        m, X0          \
	PADDD       (i*16)(AX), X0 \
	SHA256RNDS2 X0, X1, X2     \
	SHA256RNDS2 X0, X3, X4     \
	PSHUFD      $0x0e, X0, X0

#define SECOND \
	SHA256RNDS2 X0, X2, X1 \
	SHA256RNDS2 X0, X4, X3

// NEXT ends the four words after m, which SHA256MSG1 began three groups before.
#define NEXT(m, prev, next) \
	MOVO       m, X9        \
	PALIGNR    $4, prev, X9 \
	PADDD      X9, next     \
	SHA256MSG2 m, next

// ROUNDS are four rounds while words of the message are still made.
#define ROUNDS(i, m, prev, next) \
	FIRST(i, m)         \
	NEXT(m, prev, next) \
	SECOND              \
	SHA256MSG1 m, prev

// func blocks(a, b *[8]uint32, p []byte)
TEXT ·blocks(SB), NOSPLIT, $0-40
	MOVQ  a+0(FP), DI
	MOVQ  b+8(FP), BX
	MOVQ  p_base+16(FP), SI
	MOVQ  p_len+24(FP), DX
	LEAQ  k<>(SB), AX
	MOVOU bigendian<>(SB), X10
	LOAD(DI, X1, X2)
	LOAD(BX, X3, X4)
	SHRQ  $6, DX
	JZ    done

next:
	MOVO X1, X11
	MOVO X2, X12
	MOVO X3, X13
	MOVO X4, X14

	INPUT(0, X5)
	FIRST(0, X5)
	SECOND
	INPUT(1, X6)
	FIRST(1, X6)
	SECOND
	SHA256MSG1 X6, X5
	INPUT(2, X7)
	FIRST(2, X7)
	SECOND
	SHA256MSG1 X7, X6
	INPUT(3, X8)
	ROUNDS(3, X8, X7, X5)
	ROUNDS(4, X5, X8, X6)
	ROUNDS(5, X6, X5, X7)
	ROUNDS(6, X7, X6, X8)
	ROUNDS(7, X8, X7, X5)
	ROUNDS(8, X5, X8, X6)
	ROUNDS(9, X6, X5, X7)
	ROUNDS(10, X7, X6, X8)
	ROUNDS(11, X8, X7, X5)
	ROUNDS(12, X5, X8, X6)
	FIRST(13, X6)
	NEXT(X6, X5, X7)
	SECOND
	FIRST(14, X7)
	NEXT(X7, X6, X8)
	SECOND
	FIRST(15, X8)
	SECOND

	PADDD X11, X1
	PADDD X12, X2
	PADDD X13, X3
	PADDD X14, X4
	ADDQ  $64, SI
	DECQ  DX
	JNZ   next

done:
	STORE(DI, X1, X2)
	STORE(BX, X3, X4)
	RET

// func cpuid(leaf uint32) (highest, ebx, ecx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-20
	XORL  AX, AX
	CPUID
	MOVL  AX, highest+8(FP)
	MOVL  leaf+0(FP), AX
	XORL  CX, CX
	CPUID
	MOVL  BX, ebx+12(FP)
	MOVL  CX, ecx+16(FP)
	RET
