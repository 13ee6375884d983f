/* Preloaded: what would be on the disk if the power failed now.

   Under POWER_CUT_ROOT, a file's bytes reach POWER_CUT_SHADOW only when it is flushed, under its inode's number, and a
   folder's names only when the folder is flushed. Before the POWER_CUT_AT-th flush (counted from 1) the process dies.
   Built by test_power_cut.py with gcc; single-threaded writers only. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static long flushes;

static void keep_file(const char *path, const struct stat *st, const char *shadow) {
    char name[4200], part[4300], buffer[65536];
    snprintf(name, sizeof name, "%s/%lu.data", shadow, (unsigned long)st->st_ino);
    snprintf(part, sizeof part, "%s.part", name);
    /* opened again: the writer's own descriptor may not be for reading */
    int in = open(path, O_RDONLY), out = open(part, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    off_t at = 0;
    ssize_t got;
    while ((got = pread(in, buffer, sizeof buffer, at)) > 0) {
        if (write(out, buffer, got) != got) abort();
        at += got;
    }
    close(in);
    close(out);
    rename(part, name);
}

static void keep_folder(const char *path, const struct stat *st, const char *shadow) {
    char name[4200], part[4300];
    snprintf(name, sizeof name, "%s/%lu.names", shadow, (unsigned long)st->st_ino);
    snprintf(part, sizeof part, "%s.part", name);
    FILE *out = fopen(part, "w");
    DIR *folder = opendir(path);
    struct dirent *entry;
    struct stat inner;
    while ((entry = readdir(folder)) != NULL)
        /* not entry's own number and kind, which some file systems tell otherwise */
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
            !fstatat(dirfd(folder), entry->d_name, &inner, AT_SYMLINK_NOFOLLOW))
            fprintf(out, "%lu %d %s\n", (unsigned long)inner.st_ino, S_ISDIR(inner.st_mode), entry->d_name);
    closedir(folder);
    fclose(out);
    rename(part, name);
}

static int flushed(int fd, const char *real_name) {
    const char *root = getenv("POWER_CUT_ROOT"), *shadow = getenv("POWER_CUT_SHADOW"), *limit = getenv("POWER_CUT_AT");
    char self[64], path[4096];
    struct stat st;
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, real_name);
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(self, path, sizeof path - 1);
    if (length < 0 || root == NULL) return real(fd);
    path[length] = 0;
    if (strncmp(path, root, strlen(root)) || fstat(fd, &st)) return real(fd);
    if (++flushes == atol(limit)) kill(getpid(), SIGKILL);
    if (S_ISDIR(st.st_mode)) keep_folder(path, &st, shadow);
    else {
        /* a second name, so that the number is never given to another file */
        char keep[4200];
        snprintf(keep, sizeof keep, "%s/%lu.keep", shadow, (unsigned long)st.st_ino);
        if (link(path, keep)) { /* it has one already */ }
        keep_file(path, &st, shadow);
    }
    return real(fd);
}

int fsync(int fd) { return flushed(fd, "fsync"); }
int fdatasync(int fd) { return flushed(fd, "fdatasync"); }
