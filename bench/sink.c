/* sink.c - the downstream of every measured system: accepts all mail, counts it, keeps nothing.
 *
 *   sink PORT [LOG]
 *
 * Listens on 127.0.0.1:PORT and prints "ready".  Each line on standard input is answered by one line of JSON with what
 * arrived since the last one; the end of standard input ends the program.  LOG gets a line with the number of each message,
 * and is complete when the program has ended.
 *
 * It must cost little and the same for every system, so it does not look at every byte: a message ends when the bytes
 * received end in CRLF "." CRLF.  That is right for clients that wait for the reply to the dot before they go on, which
 * all systems here do, and for the content of load.c, which never contains that sequence.  What the system prepended is
 * told from what the client sent by the first line of load.c's messages (MARK): sizes are counted from there.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MARK "X-Bench-Number: "
#define MARK_DIGITS 10
#define HEAD_BYTES 8192 /* what a system prepends must fit */
#define LINE_BYTES 2048

static const char EHLO_REPLY[] = "250-sink.example\r\n250-PIPELINING\r\n250-SIZE 104857600\r\n250-8BITMIME\r\n"
                                 "250 ENHANCEDSTATUSCODES\r\n";

typedef struct {
    int fd, in_content, is_closing;
    size_t line_used, head_used, content_bytes;
    char last[5]; /* the last bytes of the content */
    char line[LINE_BYTES], head[HEAD_BYTES], out[LINE_BYTES];
    size_t out_used;
} Connection;

static int poller;
static FILE *log_file;
static long connections, commands, messages, damaged, number_sum, content_bytes;

static void say(Connection *c, const char *text) {
    size_t length = strlen(text);
    if (c->out_used + length > sizeof c->out) { c->is_closing = 1; return; } /* nobody pipelines that much */
    memcpy(c->out + c->out_used, text, length);
    c->out_used += length;
}

static void end_of_content(Connection *c) {
    char *mark = memmem(c->head, c->head_used, MARK, sizeof MARK - 1);
    c->in_content = 0;
    messages++;
    if (mark && c->head + c->head_used - mark >= (long)sizeof MARK - 1 + MARK_DIGITS) {
        long number = atol(mark + sizeof MARK - 1);
        number_sum += number;
        if (log_file) fprintf(log_file, "%ld\n", number);
        content_bytes += c->content_bytes - (mark - c->head) - 3; /* without the dot's line */
    } else {
        damaged++;
    }
    say(c, "250 2.0.0 Ok\r\n");
}

static void take_content(Connection *c, const char *block, size_t length) {
    size_t room = HEAD_BYTES - c->head_used, head = length < room ? length : room;
    memcpy(c->head + c->head_used, block, head);
    c->head_used += head;
    c->content_bytes += length;
    if (length >= 5) {
        memcpy(c->last, block + length - 5, 5);
    } else {
        memmove(c->last, c->last + length, 5 - length);
        memcpy(c->last + 5 - length, block, length);
    }
    if (!memcmp(c->last, "\r\n.\r\n", 5)) end_of_content(c);
}

static void take_command(Connection *c) {
    commands++;
    if (!strncasecmp(c->line, "EHLO", 4)) say(c, EHLO_REPLY);
    else if (!strncasecmp(c->line, "HELO", 4)) say(c, "250 sink.example\r\n");
    else if (!strncasecmp(c->line, "MAIL", 4)) say(c, "250 2.1.0 Ok\r\n");
    else if (!strncasecmp(c->line, "RCPT", 4)) say(c, "250 2.1.5 Ok\r\n");
    else if (!strncasecmp(c->line, "RSET", 4) || !strncasecmp(c->line, "NOOP", 4)) say(c, "250 2.0.0 Ok\r\n");
    else if (!strncasecmp(c->line, "DATA", 4)) {
        say(c, "354 Go ahead\r\n");
        c->in_content = 1;
        c->head_used = c->content_bytes = 0;
        memcpy(c->last, "...\r\n", 5); /* a dot on the first line ends the content, too */
    } else if (!strncasecmp(c->line, "QUIT", 4)) {
        say(c, "221 2.0.0 Bye\r\n");
        c->is_closing = 1;
    } else say(c, "500 5.5.1 Unknown\r\n");
}

static void take(Connection *c, const char *block, size_t length) {
    while (length && !c->is_closing) {
        if (c->in_content) { take_content(c, block, length); return; }
        char *newline = memchr(block, '\n', length);
        size_t used = newline ? (size_t)(newline - block) + 1 : length;
        if (c->line_used + used >= LINE_BYTES) { c->is_closing = 1; return; }
        memcpy(c->line + c->line_used, block, used);
        c->line_used += used;
        block += used;
        length -= used;
        if (!newline) return;
        c->line[c->line_used] = 0;
        c->line_used = 0;
        take_command(c);
    }
}

static void flush_replies(Connection *c) {
    /* replies are tiny, the socket's buffer is not: a short write means that the peer is gone */
    if (c->out_used && send(c->fd, c->out, c->out_used, MSG_NOSIGNAL) != (ssize_t)c->out_used) c->is_closing = 1;
    c->out_used = 0;
}

static void report(void) {
    static double cpu_before_s;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
    printf("{\"connections\":%ld,\"commands\":%ld,\"messages\":%ld,\"damaged\":%ld,\"number_sum\":%ld,\"content_bytes\":%ld,"
           "\"cpu_s\":%.6f}\n", connections, commands, messages, damaged, number_sum, content_bytes,
           cpu_s - cpu_before_s);
    fflush(stdout);
    cpu_before_s = cpu_s;
    connections = commands = messages = damaged = number_sum = content_bytes = 0;
}

static void watch(int fd, Connection *c) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) { perror("sink: epoll_ctl"); exit(1); }
}

int main(int argc, char **argv) {
    static char block[1 << 18];
    static Connection control, acceptor;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (argc != 2 && argc != 3) { fprintf(stderr, "usage: sink PORT [LOG]\n"); return 2; }
    if (argc == 3 && !(log_file = fopen(argv[2], "w"))) { perror(argv[2]); return 1; }
    here.sin_port = htons(atoi(argv[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&here, sizeof here) || listen(listener, 4096)) { perror("sink: listen"); return 1; }
    poller = epoll_create1(0);
    watch(0, &control);
    watch(listener, &acceptor);
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[128];
        int ready = epoll_wait(poller, events, 128, -1);
        if (ready < 0 && errno != EINTR) { perror("sink: epoll_wait"); return 1; }
        for (int i = 0; i < ready; i++) {
            Connection *c = events[i].data.ptr;
            if (c == &control) {
                ssize_t got = read(0, block, sizeof block);
                if (got <= 0) return log_file && fclose(log_file) ? 1 : 0;
                for (ssize_t k = 0; k < got; k++) if (block[k] == '\n') report();
            } else if (c == &acceptor) {
                int fd = accept(listener, 0, 0);
                if (fd < 0) continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                c = calloc(1, sizeof *c);
                c->fd = fd;
                connections++;
                watch(fd, c);
                say(c, "220 sink.example ESMTP\r\n");
                flush_replies(c);
            } else {
                ssize_t got = recv(c->fd, block, sizeof block, 0);
                if (got > 0) { take(c, block, got); flush_replies(c); }
                if (got <= 0 || c->is_closing) { close(c->fd); free(c); }
            }
        }
    }
}
