/* SPDX-License-Identifier: MIT */
/*
 * seal against vectors of the cipher's specification, every bit of what is sealed, and threads.
 *
 * Build: this file, csrc/seal.c, csrc/fault_point.c, csrc/base.c; -lcrypto -pthread. With -DVSWAP_FAULT_POINTS more
 *        is tried.
 * Usage: test_seal [SEED [bench]]
 */
#include <errno.h>
#include <pthread.h>

#include "check.h"

#include "base.h"
#include "fault_point.h"
#include "limits.h"
#include "seal.h"

static uint64_t seed_state;

static void random_fill(uint64_t *random, void *bytes, size_t length)
{
	for (size_t i = 0; i < length; i++)
		((uint8_t *)bytes)[i] = (uint8_t)random_next(random);
}

/* McGrew and Viega, "The Galois/Counter Mode of Operation", test cases 14 and 16 (bytes and context cut as there). */
static void test_vectors(void)
{
	static const uint8_t zeros[SEAL_KEY_BYTES];
	static const uint8_t cipher_14[] = { 0xce, 0xa7, 0x40, 0x3d, 0x4d, 0x60, 0x6b, 0x6e,
					     0x07, 0x4e, 0xc5, 0xd3, 0xba, 0xf3, 0x9d, 0x18 };
	static const uint8_t tag_14[] = { 0xd0, 0xd1, 0xc8, 0xa7, 0x99, 0x99, 0x6b, 0xf0,
					  0x26, 0x5b, 0x98, 0xb5, 0xd4, 0x8a, 0xb9, 0x19 };
	static const uint8_t key_16[] = { 0xfe, 0xff, 0xe9, 0x92, 0x86, 0x65, 0x73, 0x1c, 0x6d, 0x6a, 0x8f,
					  0x94, 0x67, 0x30, 0x83, 0x08, 0xfe, 0xff, 0xe9, 0x92, 0x86, 0x65,
					  0x73, 0x1c, 0x6d, 0x6a, 0x8f, 0x94, 0x67, 0x30, 0x83, 0x08 };
	static const uint8_t context_16[] = { 0xfe, 0xed, 0xfa, 0xce, 0xde, 0xad, 0xbe, 0xef, 0xfe, 0xed,
					      0xfa, 0xce, 0xde, 0xad, 0xbe, 0xef, 0xab, 0xad, 0xda, 0xd2 };
	static const uint8_t plain_16[] = {
		0xd9, 0x31, 0x32, 0x25, 0xf8, 0x84, 0x06, 0xe5, 0xa5, 0x59, 0x09, 0xc5, 0xaf, 0xf5, 0x26,
		0x9a, 0x86, 0xa7, 0xa9, 0x53, 0x15, 0x34, 0xf7, 0xda, 0x2e, 0x4c, 0x30, 0x3d, 0x8a, 0x31,
		0x8a, 0x72, 0x1c, 0x3c, 0x0c, 0x95, 0x95, 0x68, 0x09, 0x53, 0x2f, 0xcf, 0x0e, 0x24, 0x49,
		0xa6, 0xb5, 0x25, 0xb1, 0x6a, 0xed, 0xf5, 0xaa, 0x0d, 0xe6, 0x57, 0xba, 0x63, 0x7b, 0x39 };
	static const uint8_t cipher_16[] = {
		0x52, 0x2d, 0xc1, 0xf0, 0x99, 0x56, 0x7d, 0x07, 0xf4, 0x7f, 0x37, 0xa3, 0x2a, 0x84, 0x42,
		0x7d, 0x64, 0x3a, 0x8c, 0xdc, 0xbf, 0xe5, 0xc0, 0xc9, 0x75, 0x98, 0xa2, 0xbd, 0x25, 0x55,
		0xd1, 0xaa, 0x8c, 0xb0, 0x8e, 0x48, 0x59, 0x0d, 0xbb, 0x3d, 0xa7, 0xb0, 0x8b, 0x10, 0x56,
		0x82, 0x88, 0x38, 0xc5, 0xf6, 0x1e, 0x63, 0x93, 0xba, 0x7a, 0x0a, 0xbc, 0xc9, 0xf6, 0x62 };
	static const uint8_t tag_16[] = { 0x76, 0xfc, 0x6e, 0xce, 0x0f, 0x4e, 0x17, 0x68,
					  0xcd, 0xdf, 0x88, 0x53, 0xbb, 0x2d, 0x55, 0x1b };
	struct seal_nonce nonce_16 = { .generation = 0xaddbcefabebafeca, .unit = 0x88f8cade }; /* cafebabefacedbaddecaf888 */
	uint8_t bytes[64] = { 0 }, tag[SEAL_TAG_BYTES];
	struct seal *seal;

	CHECK(seal_create(zeros, &seal) == 0);
	CHECK(seal_encrypt(seal, (struct seal_nonce){ 0 }, (struct seal_context){ "", 0 }, bytes, 16, tag) == 0);
	CHECK(memcmp(bytes, cipher_14, 16) == 0 && memcmp(tag, tag_14, 16) == 0);
	seal_destroy(seal);
	CHECK(seal_create(key_16, &seal) == 0);
	memcpy(bytes, plain_16, sizeof plain_16);
	CHECK(seal_encrypt(seal, nonce_16, (struct seal_context){ context_16, sizeof context_16 }, bytes, sizeof plain_16,
			   tag) == 0);
	CHECK(memcmp(bytes, cipher_16, sizeof cipher_16) == 0 && memcmp(tag, tag_16, 16) == 0);
	seal_destroy(seal);
	seal_destroy(NULL);
}

/* Whatever is changed, by one bit, it does not open; then, unchanged, by the same contexts, it does. */
static void test_changes(void)
{
	enum { LENGTH = 192, CONTEXT = 16 };
	uint8_t key[SEAL_KEY_BYTES], plain[LENGTH], bytes[LENGTH], opened[LENGTH], context[CONTEXT], tag[SEAL_TAG_BYTES];
	struct seal_nonce nonce = { .generation = 1, .unit = 7 };
	struct seal_context what = { context, CONTEXT };
	struct seal *seal;

	random_fill(&seed_state, key, sizeof key);
	random_fill(&seed_state, plain, sizeof plain);
	random_fill(&seed_state, context, sizeof context);
	CHECK(seal_create(key, &seal) == 0);
	memcpy(bytes, plain, LENGTH);
	CHECK(seal_encrypt(seal, nonce, what, bytes, LENGTH, tag) == 0);
	for (unsigned bit = 0; bit < 8 * (LENGTH + CONTEXT + SEAL_TAG_BYTES + 12); bit++) {
		unsigned at = bit / 8;
		uint8_t *places[] = { bytes, context, tag, (uint8_t *)&nonce };
		unsigned sizes[] = { LENGTH, CONTEXT, SEAL_TAG_BYTES, 12 }, i = 0;

		for (; at >= sizes[i]; i++)
			at -= sizes[i];
		places[i][at] ^= (uint8_t)(1u << bit % 8);
		CHECK(seal_decrypt(seal, nonce, what, bytes, LENGTH, tag, opened) == -EBADMSG);
		places[i][at] ^= (uint8_t)(1u << bit % 8);
		if (bit % 100 == 0) { /* a context goes from the one to the other, also after a failure */
			CHECK(seal_encrypt(seal, (struct seal_nonce){ 2 + bit, 0 }, what, opened, LENGTH, opened) == 0);
			CHECK(seal_decrypt(seal, nonce, what, bytes, LENGTH, tag, opened) == 0);
			CHECK(memcmp(opened, plain, LENGTH) == 0);
		}
	}
	CHECK(seal_decrypt(seal, nonce, what, bytes, LENGTH, tag, bytes) == 0 && memcmp(bytes, plain, LENGTH) == 0);
	seal_destroy(seal);
}

struct user {
	struct seal *seal;
	uint64_t number;
	pthread_t thread;
};

static void *user_main(void *argument)
{
	struct user *user = argument;
	uint64_t random = user->number;
	static _Thread_local uint8_t plain[PAGE_BYTES], bytes[PAGE_BYTES];
	uint8_t tag[SEAL_TAG_BYTES];

	for (unsigned i = 0; i < 2000; i++) {
		struct seal_nonce nonce = { .generation = user->number, .unit = i };
		struct seal_context context = { &user->number, sizeof user->number };
		size_t length = 64 * (1 + random_below(&random, 64));

		for (size_t k = 0; k < length; k += 8)
			*(uint64_t *)(void *)(plain + k) = random_next(&random);
		memcpy(bytes, plain, length);
		CHECK(seal_encrypt(user->seal, nonce, context, bytes, length, tag) == 0);
		CHECK(memcmp(bytes, plain, length) != 0);
		CHECK(seal_decrypt(user->seal, nonce, context, bytes, length, tag, bytes) == 0);
		CHECK(memcmp(bytes, plain, length) == 0);
	}
	return NULL;
}

/* More of them than contexts are kept. */
static void test_threads(void)
{
	enum { USERS = 20 };
	struct user users[USERS];
	uint8_t key[SEAL_KEY_BYTES];
	struct seal *seal;

	random_fill(&seed_state, key, sizeof key);
	CHECK(seal_create(key, &seal) == 0);
	for (unsigned i = 0; i < USERS; i++) {
		users[i] = (struct user){ .seal = seal, .number = i + 1 };
		CHECK(pthread_create(&users[i].thread, NULL, user_main, &users[i]) == 0);
	}
	for (unsigned i = 0; i < USERS; i++)
		pthread_join(users[i].thread, NULL);
	seal_destroy(seal);
}

static void test_faults(void)
{
#ifdef VSWAP_FAULT_POINTS
	uint8_t key[SEAL_KEY_BYTES] = { 1 }, bytes[64] = { 0 }, tag[SEAL_TAG_BYTES];
	struct seal_context context = { "", 0 };
	struct seal *seal;

	CHECK(seal_create(key, &seal) == 0);
	fault_point_set("seal/encrypt", 1, ENOMEM, false);
	CHECK(seal_encrypt(seal, (struct seal_nonce){ 1, 0 }, context, bytes, 64, tag) == -ENOMEM);
	CHECK(seal_encrypt(seal, (struct seal_nonce){ 2, 0 }, context, bytes, 64, tag) == 0);
	fault_point_set("seal/decrypt", 1, ENOMEM, false);
	CHECK(seal_decrypt(seal, (struct seal_nonce){ 2, 0 }, context, bytes, 64, tag, bytes) == -ENOMEM);
	CHECK(seal_decrypt(seal, (struct seal_nonce){ 2, 0 }, context, bytes, 64, tag, bytes) == 0);
	fault_point_clear();
	seal_destroy(seal);
#else
	printf("skip: fault points are not built in\n");
#endif
}

static void bench(void)
{
	static const size_t lengths[] = { 256, 1024, 2560, 4096 };
	static uint8_t bytes[PAGE_BYTES];
	uint8_t key[SEAL_KEY_BYTES] = { 0 }, tag[SEAL_TAG_BYTES];
	struct seal *seal;

	CHECK(seal_create(key, &seal) == 0);
	for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
		enum { TIMES = 200000 };
		struct seal_context context = { key, 16 };
		uint64_t start = test_now_ns(), middle;

		for (unsigned k = 0; k < TIMES; k++)
			CHECK(seal_encrypt(seal, (struct seal_nonce){ i, k }, context, bytes, lengths[i], tag) == 0);
		middle = test_now_ns();
		for (unsigned k = 0; k < TIMES; k++)
			(void)seal_decrypt(seal, (struct seal_nonce){ i, k }, context, bytes, lengths[i], tag, bytes);
		printf("%4zu bytes: encrypt %.3f us, decrypt %.3f us\n", lengths[i],
		       (double)(middle - start) / 1e3 / TIMES, (double)(test_now_ns() - middle) / 1e3 / TIMES);
	}
	seal_destroy(seal);
}

int main(int argc, char **argv)
{
	seed_state = test_seed(argc, argv);
	if (test_is_bench(argc, argv)) {
		bench();
		return 0;
	}
	test_vectors();
	test_changes();
	test_threads();
	test_faults();
	printf("passed\n");
	return 0;
}
