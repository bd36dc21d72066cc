/* SPDX-License-Identifier: MIT */
/*
 * seal — see seal.h.
 *
 * Costs (EPYC with AES instructions; docs/decisions/0015-encryption-at-rest.md): 0.6 us for 2.5 KiB, either way.
 * The key's schedule is worth keeping, a third of that for a small object: so contexts stay keyed, and what
 * changes from one use to the next is the nonce.
 */
#define _GNU_SOURCE
#include "seal.h"

#include <errno.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "fault_point.h"

#define NONCE_BYTES 12 /* which GCM takes as they are */
#define CONTEXTS_KEPT_MAX 16u /* more than threads that read and write at once, on most machines */

struct seal {
	const uint8_t *key;
	EVP_CIPHER *cipher;
	pthread_mutex_t mutex;
	EVP_CIPHER_CTX *contexts[CONTEXTS_KEPT_MAX]; /* keyed */
	unsigned context_count;
};

static EVP_CIPHER_CTX *context_create(const struct seal *seal)
{
	EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();

	if (context && EVP_CipherInit_ex(context, seal->cipher, NULL, seal->key, NULL, 1) == 1)
		return context;
	EVP_CIPHER_CTX_free(context);
	return NULL;
}

static EVP_CIPHER_CTX *context_take(struct seal *seal)
{
	EVP_CIPHER_CTX *context = NULL;

	pthread_mutex_lock(&seal->mutex);
	if (seal->context_count > 0)
		context = seal->contexts[--seal->context_count];
	pthread_mutex_unlock(&seal->mutex);
	return context ? context : context_create(seal);
}

static void context_give(struct seal *seal, EVP_CIPHER_CTX *context)
{
	pthread_mutex_lock(&seal->mutex);
	if (seal->context_count < CONTEXTS_KEPT_MAX) {
		seal->contexts[seal->context_count++] = context;
		context = NULL;
	}
	pthread_mutex_unlock(&seal->mutex);
	EVP_CIPHER_CTX_free(context);
}

int seal_create(const uint8_t key[SEAL_KEY_BYTES], struct seal **ret_seal)
{
	struct seal *seal = calloc(1, sizeof *seal);
	EVP_CIPHER_CTX *context = NULL;

	if (!seal)
		return -ENOMEM;
	pthread_mutex_init(&seal->mutex, NULL);
	seal->key = key;
	seal->cipher = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
	if (seal->cipher)
		context = context_create(seal);
	if (!context) {
		bool is_known = seal->cipher;

		seal_destroy(seal);
		return is_known ? -ENOMEM : -ENOTSUP;
	}
	context_give(seal, context);
	*ret_seal = seal;
	return 0;
}

void seal_destroy(struct seal *seal)
{
	if (!seal)
		return;
	while (seal->context_count > 0)
		EVP_CIPHER_CTX_free(seal->contexts[--seal->context_count]);
	EVP_CIPHER_free(seal->cipher);
	pthread_mutex_destroy(&seal->mutex);
	free(seal);
}

/* A new nonce, and what is authenticated only. `encrypts` or not may change from one use of a context to the next. */
static bool begin(EVP_CIPHER_CTX *cipher, struct seal_nonce nonce, struct seal_context context, bool encrypts)
{
	uint8_t bytes[NONCE_BYTES];
	int length;

	memcpy(bytes, &nonce.generation, sizeof nonce.generation);
	memcpy(bytes + sizeof nonce.generation, &nonce.unit, sizeof nonce.unit);
	return EVP_CipherInit_ex(cipher, NULL, NULL, NULL, bytes, encrypts) == 1 &&
	       EVP_CipherUpdate(cipher, NULL, &length, context.bytes, (int)context.length) == 1;
}

int seal_encrypt(struct seal *seal, struct seal_nonce nonce, struct seal_context context, void *bytes, size_t length,
		 uint8_t ret_tag[SEAL_TAG_BYTES])
{
	int error = fault_point("seal/encrypt");
	EVP_CIPHER_CTX *cipher = error ? NULL : context_take(seal);
	int done;
	bool ok;

	if (!cipher)
		return -ENOMEM;
	/* Nothing but memory can be missing: a length or a nonce that libcrypto refuses would be ours. */
	ok = begin(cipher, nonce, context, true) &&
	     EVP_CipherUpdate(cipher, bytes, &done, bytes, (int)length) == 1 && done == (int)length &&
	     EVP_CipherFinal_ex(cipher, (uint8_t *)bytes + length, &done) == 1 && done == 0 &&
	     EVP_CIPHER_CTX_ctrl(cipher, EVP_CTRL_AEAD_GET_TAG, SEAL_TAG_BYTES, ret_tag) == 1;
	context_give(seal, cipher);
	return ok ? 0 : -ENOMEM;
}

int seal_decrypt(struct seal *seal, struct seal_nonce nonce, struct seal_context context, const void *from,
		 size_t length, const uint8_t tag[SEAL_TAG_BYTES], void *to)
{
	int error = fault_point("seal/decrypt");
	EVP_CIPHER_CTX *cipher = error ? NULL : context_take(seal);
	uint8_t wanted[SEAL_TAG_BYTES];
	bool ok, is_true = false;
	int done;

	if (!cipher)
		return error ? -error : -ENOMEM;
	memcpy(wanted, tag, SEAL_TAG_BYTES); /* libcrypto asks for one that it may write to */
	ok = begin(cipher, nonce, context, false) &&
	     EVP_CipherUpdate(cipher, to, &done, from, (int)length) == 1 && done == (int)length &&
	     EVP_CIPHER_CTX_ctrl(cipher, EVP_CTRL_AEAD_SET_TAG, SEAL_TAG_BYTES, wanted) == 1;
	if (ok)
		is_true = EVP_CipherFinal_ex(cipher, (uint8_t *)to + length, &done) == 1;
	context_give(seal, cipher);
	return !ok ? -ENOMEM : is_true ? 0 : -EBADMSG;
}
