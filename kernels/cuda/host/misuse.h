// Kernels that the host has to notice: each runs in a child process, which has to fail with a sentence.
#pragma once

#include <sys/wait.h>

#include "harness.h"

inline std::string said_by(const std::function<void()>& body) {
    int ends[2];
    if (pipe(ends) != 0) fibres::fail("no pipe");
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        body();
        std::fflush(stdout);
        std::_Exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[512];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 1) fibres::fail("a broken kernel passed, saying: %s", text.c_str());
    return text;
}

inline void expect_said(const std::function<void()>& body, const char* part) {
    const std::string text = said_by(body);
    if (text.find(part) == std::string::npos) fibres::fail("it said \"%s\", expected \"%s\"", text.c_str(), part);
}
