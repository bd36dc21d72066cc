/* SPDX-License-Identifier: MIT */
#include "available.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "engine.h"
#include "sys.h"

#define MIB (1ULL << 20)
#define TEXT_BYTES 8192
#define PATH_BYTES 4096
#define NO_LIMIT (1ULL << 60) /* version 1 writes all of its address space */
#define AUTO_PART 50
#define AUTO_BYTES_MIN (16 * MIB)
#define AUTO_BYTES_MAX (512 * MIB)
#define AUTO_PART_MAX 8 /* of what is small */

/* The number behind `name` at the begin of a line: 0, or -ENODATA. */
static int number_of(const char *text, const char *name, uint64_t *ret_number)
{
	size_t length = strlen(name);

	for (const char *line = text; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (strncmp(line, name, length) == 0 && (line[length] == ' ' || line[length] == ':')) {
			*ret_number = strtoull(line + length + 1, NULL, 10);
			return 0;
		}
		if (*line == '\0')
			break;
	}
	return -ENODATA;
}

int available_of_machine(const char *path, struct available *ret_available)
{
	char text[TEXT_BYTES];
	uint64_t total = 0, available = 0;
	int result = sys_read_text(path, text, sizeof text);

	if (result < 0)
		return result;
	if (number_of(text, "MemTotal", &total) < 0 || number_of(text, "MemAvailable", &available) < 0)
		return -ENODATA;
	*ret_available = (struct available){ total * 1024, available * 1024 };
	return 0;
}

/* One number in a file of a cgroup; "max" is NO_LIMIT. */
static int read_number(const char *directory, const char *name, uint64_t *ret_number)
{
	char path[PATH_BYTES], text[64];
	int result;

	if (snprintf(path, sizeof path, "%s/%s", directory, name) >= (int)sizeof path)
		return -ENAMETOOLONG;
	result = sys_read_text(path, text, sizeof text);
	if (result < 0)
		return result;
	*ret_number = strncmp(text, "max", 3) == 0 ? NO_LIMIT : strtoull(text, NULL, 10);
	return 0;
}

/* File caches: what was not used lately, and half of the rest, as what is used is wanted back. */
static uint64_t cache_bytes(const char *directory, bool is_second)
{
	char path[PATH_BYTES], text[TEXT_BYTES];
	uint64_t inactive = 0, active = 0;

	if (snprintf(path, sizeof path, "%s/memory.stat", directory) >= (int)sizeof path ||
	    sys_read_text(path, text, sizeof text) < 0)
		return 0;
	(void)number_of(text, is_second ? "inactive_file" : "total_inactive_file", &inactive);
	(void)number_of(text, is_second ? "active_file" : "total_active_file", &active);
	return inactive + active / 2;
}

int available_of_cgroup(const char *directory, struct available *ret_available)
{
	uint64_t limit = NO_LIMIT, high = NO_LIMIT, usage, bytes;
	bool is_second = read_number(directory, "memory.max", &limit) == 0;
	int result;

	if (is_second)
		(void)read_number(directory, "memory.high", &high); /* beyond it programs are slowed down */
	result = is_second ? read_number(directory, "memory.current", &usage)
			   : read_number(directory, "memory.usage_in_bytes", &usage);
	if (result == 0 && !is_second)
		result = read_number(directory, "memory.limit_in_bytes", &limit);
	if (result < 0)
		return result;
	limit = min_of(limit, high);
	if (limit >= NO_LIMIT)
		return -ENODATA;
	bytes = limit - min_of(limit, usage);
	bytes = usage > limit ? 0 : min_of(limit, bytes + cache_bytes(directory, is_second));
	*ret_available = (struct available){ limit, bytes };
	return 0;
}

/* Is one of the names between commas "memory"? */
static bool has_memory(const char *names, size_t length)
{
	for (size_t at = 0; at < length;) {
		size_t end = at;

		while (end < length && names[end] != ',')
			end++;
		if (end - at == 6 && memcmp(names + at, "memory", 6) == 0)
			return true;
		at = end + 1;
	}
	return false;
}

bool available_is_member(const char *text, unsigned version, const char *group)
{
	size_t length = strlen(group);

	if (length > 0 && group[length - 1] == '/')
		length--; /* "/": all are below it */
	for (const char *line = text; line && *line; line = strchr(line, '\n')) {
		const char *names, *path;

		line += *line == '\n';
		names = strchr(line, ':');
		path = names ? strchr(names + 1, ':') : NULL;
		if (!path)
			return false;
		if (version == 2 ? path != names + 1 : !has_memory(names + 1, (size_t)(path - names - 1)))
			continue;
		path++;
		return strncmp(path, group, length) == 0 &&
		       (path[length] == '/' || path[length] == '\n' || path[length] == '\0');
	}
	return false;
}

uint64_t available_reserve(uint64_t wanted_bytes, uint64_t total_bytes)
{
	if (wanted_bytes != ENGINE_HOST_RESERVE_AUTO)
		return wanted_bytes;
	return min_of(min_of(max_of(total_bytes / AUTO_PART, AUTO_BYTES_MIN), AUTO_BYTES_MAX), total_bytes / AUTO_PART_MAX);
}
