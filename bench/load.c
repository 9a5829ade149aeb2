/* load.c - the clients of every measured system: many connections at once, one message on each.
 *
 *   load -p PORT -s SIZE -c CONNECTIONS -n MESSAGES [-f FIRST] [-r RECIPIENTS] [-H]
 *
 * Sends MESSAGES messages of SIZE bytes of content (without the dot's line), numbered from FIRST, to 127.0.0.1:PORT,
 * CONNECTIONS at a time, each on a connection of its own: banner, EHLO, MAIL RCPT DATA (in one write where PIPELINING is
 * offered), content, QUIT.  The recipients are rcptK@rcpt.example with K = number modulo RECIPIENTS, or, with 0, K = number:
 * each message a recipient that nobody asked for before.  The clients' addresses are spread over 127.0.1.1-100.
 *
 * -H: MESSAGES connections send all but the final dot; then "held N" is printed and a line on standard input awaited;
 * then all send their dot at once.
 *
 * Prints one line of JSON.  number_sum and content_bytes are of the accepted messages only: what the sink must have.
 * Latency is from connect() to the reply to the dot.  Exit code 0 whatever the server did, 1 when the load itself failed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define CLIENT_ADDRESSES 100
#define STALLED_S 60.0
#define DOT ".\r\n"

typedef enum { BANNER, EHLO, MAIL, RCPT, DATA, CONTENT, ANSWER, QUIT, CLOSED } State;
typedef struct {
    int fd, is_pipelining, refused; /* refused: the first reply to MAIL or RCPT that was not 2xx */
    State state;
    long number;
    double began_s;
    size_t sent; /* bytes of head and body already written */
    size_t in_used;
    char in[4096], head[1024];
} Connection;

static int poller, is_holding, at_once = 20;
static long port, size_bytes, messages, first, recipients = 100;
static long started, open_connections, held, accepted, refused, failed, number_sum;
static double *latency_s;
static char *body; /* the same in every message; ends in the dot's line */
static size_t head_bytes, body_bytes;
static char first_refusal[200];

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* Digits have a fixed width, so every message has the same size. */
static size_t write_head(char *out, size_t room, long number) {
    return snprintf(out, room,
        "X-Bench-Number: %010ld\r\n"
        "Received: from outbound.example.org (outbound.example.org [192.0.2.25])\r\n"
        "\tby relay.example.org (Postfix) with ESMTPS id 4XyZ%010ld\r\n"
        "\tfor <rcpt@rcpt.example>; Tue, 14 Jan 2025 10:00:00 +0000 (UTC)\r\n"
        "Message-ID: <%010ld.bench@example.org>\r\n"
        "Date: Tue, 14 Jan 2025 10:00:00 +0000\r\n"
        "From: A Sender <sender@example.org>\r\n"
        "To: A Recipient <rcpt@rcpt.example>\r\n"
        "Subject: message %010ld of a measurement\r\n"
        "MIME-Version: 1.0\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        "Content-Transfer-Encoding: 8bit\r\n"
        "\r\n", number, number, number, number);
}

static void make_body(void) {
    char head[1024];
    head_bytes = write_head(head, sizeof head, 0);
    if ((size_t)size_bytes < head_bytes + 2) { fprintf(stderr, "load: at least %zu bytes\n", head_bytes + 2); exit(1); }
    body_bytes = size_bytes - head_bytes + sizeof DOT - 1;
    body = malloc(body_bytes + 128);
    size_t end = size_bytes - head_bytes, at = 0;
    for (long line = 1; at < end; line++) {
        size_t length = end - at < 80 ? end - at : 76; /* the last line takes what is left: 2 to 79 bytes */
        for (size_t k = 0; k + 2 < length; k++) body[at + k] = k % 7 == 6 ? ' ' : 'a' + (line * 31 + k * 7) % 26;
        if (line % 256 == 0 && length > 4) memcpy(body + at, "..", 2); /* dot-stuffed, as real text is now and then */
        memcpy(body + at + length - 2, "\r\n", 2);
        at += length;
    }
    memcpy(body + end, DOT, sizeof DOT - 1);
}

static void want(Connection *c, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event)) die("load: epoll_ctl");
}

static void begin(Connection *c) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in client = {.sin_family = AF_INET};
    int one = 1;
    c->state = CLOSED;
    if (started == messages) return;
    c->number = first + started++;
    c->refused = 0;
    c->sent = c->in_used = 0;
    c->began_s = now_s();
    c->state = BANNER;
    client.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 0x100 + c->number % CLIENT_ADDRESSES); /* 127.0.1.1 and on */
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0) die("load: socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(c->fd, (void *)&client, sizeof client)) die("load: bind");
    if (connect(c->fd, (void *)&server, sizeof server) && errno != EINPROGRESS) die("load: connect");
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) die("load: epoll_ctl");
    open_connections++;
}

static void end(Connection *c) {
    if (c->state != QUIT) failed++;
    close(c->fd);
    open_connections--;
    begin(c);
}

static void say(Connection *c, const char *text) {
    size_t length = strlen(text);
    /* commands are tiny: a short write means that the server is gone, which the next read shows */
    if (send(c->fd, text, length, MSG_NOSIGNAL) != (ssize_t)length && errno != EPIPE && errno != ECONNRESET) die("load: send");
}

static void envelope(Connection *c) {
    char mail[128], rcpt[128], batch[300];
    long who = recipients ? c->number % recipients : c->number;
    snprintf(mail, sizeof mail, "MAIL FROM:<sender%ld@example.org> SIZE=%ld\r\n", c->number % 1000, size_bytes);
    snprintf(rcpt, sizeof rcpt, "RCPT TO:<rcpt%ld@rcpt.example>\r\n", who);
    if (c->is_pipelining) {
        if (c->state != EHLO) return; /* all was said at once */
        snprintf(batch, sizeof batch, "%s%sDATA\r\n", mail, rcpt);
        say(c, batch);
    } else {
        say(c, c->state == EHLO ? mail : c->state == MAIL ? rcpt : "DATA\r\n");
    }
}

static void send_content(Connection *c) {
    size_t total = head_bytes + body_bytes - (is_holding ? sizeof DOT - 1 : 0);
    while (c->sent < total) {
        struct iovec parts[2];
        int count = 0;
        if (c->sent < head_bytes) parts[count++] = (struct iovec){c->head + c->sent, head_bytes - c->sent};
        size_t skip = c->sent < head_bytes ? 0 : c->sent - head_bytes;
        parts[count++] = (struct iovec){body + skip, total - head_bytes - skip};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t written = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (written < 0 && errno == EAGAIN) { want(c, EPOLLIN | EPOLLOUT); return; }
        if (written < 0) { want(c, EPOLLIN); return; } /* the read that follows tells why */
        c->sent += written;
    }
    want(c, EPOLLIN);
    if (is_holding) held++;
    else c->state = ANSWER;
}

static void judged(Connection *c, int code, const char *line) {
    if (code / 100 == 2) {
        latency_s[accepted++] = now_s() - c->began_s;
        number_sum += c->number;
    } else {
        refused++;
        if (!*first_refusal) snprintf(first_refusal, sizeof first_refusal, "%.*s", (int)strcspn(line, "\r\n"), line);
    }
    c->state = QUIT;
    say(c, "QUIT\r\n");
}

/* `code` is the last line of a reply. */
static void take_reply(Connection *c, int code, const char *line) {
    switch (c->state) {
    case BANNER:
        if (code != 220) { judged(c, code, line); break; }
        say(c, "EHLO client.example.org\r\n");
        c->state = EHLO;
        break;
    case EHLO:
        if (code != 250) { judged(c, code, line); break; }
        envelope(c);
        c->state = MAIL;
        break;
    case MAIL: case RCPT:
        if (code / 100 != 2) {
            if (!c->is_pipelining) { judged(c, code, line); break; }
            if (!c->refused) c->refused = code;
        }
        envelope(c);
        c->state++;
        break;
    case DATA:
        if (code != 354) { judged(c, c->refused ? c->refused : code, line); break; }
        write_head(c->head, sizeof c->head, c->number);
        c->state = CONTENT;
        send_content(c);
        break;
    case CONTENT: case ANSWER: judged(c, code, line); break; /* in CONTENT: an early refusal */
    case QUIT: end(c); break;
    case CLOSED: break;
    }
}

static void read_replies(Connection *c) {
    ssize_t got = recv(c->fd, c->in + c->in_used, sizeof c->in - 1 - c->in_used, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) { end(c); return; }
    c->in_used += got;
    c->in[c->in_used] = 0;
    char *line = c->in, *newline;
    long number = c->number;
    while ((newline = memchr(line, '\n', c->in + c->in_used - line))) {
        char *next = newline + 1;
        if (c->state == EHLO && !strncasecmp(line + 4, "PIPELINING", 10)) c->is_pipelining = 1;
        if (newline - line < 4 || line[3] != '-') take_reply(c, atoi(line), line);
        if (c->number != number || c->state == CLOSED) return; /* another connection lives here now */
        line = next;
    }
    c->in_used -= line - c->in;
    memmove(c->in, line, c->in_used);
    if (c->in_used == sizeof c->in - 1) end(c); /* an endless line */
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile_ms(int percent) {
    return accepted ? latency_s[(accepted - 1) * percent / 100] * 1e3 : 0;
}

static void release(Connection *all) {
    char go;
    printf("held %ld\n", held);
    fflush(stdout);
    while (read(0, &go, 1) == 1 && go != '\n') {}
    is_holding = 0;
    for (int i = 0; i < at_once; i++) if (all[i].state == CONTENT) send_content(&all[i]);
}

int main(int argc, char **argv) {
    for (int option; (option = getopt(argc, argv, "p:s:c:n:f:r:H")) != -1;) switch (option) {
        case 'p': port = atol(optarg); break;
        case 's': size_bytes = atol(optarg); break;
        case 'c': at_once = atoi(optarg); break;
        case 'n': messages = atol(optarg); break;
        case 'f': first = atol(optarg); break;
        case 'r': recipients = atol(optarg); break;
        case 'H': is_holding = 1; break;
        default: return 2;
    }
    if (is_holding) at_once = messages;
    make_body();
    poller = epoll_create1(0);
    latency_s = calloc(messages + 1, sizeof *latency_s);
    Connection *all = calloc(at_once, sizeof *all);
    double began_s = now_s(), active_s = began_s;
    for (int i = 0; i < at_once; i++) begin(&all[i]);
    while (open_connections) {
        struct epoll_event events[128];
        int ready = epoll_wait(poller, events, 128, 1000);
        if (ready > 0) active_s = now_s();
        else if (now_s() - active_s > STALLED_S) { fprintf(stderr, "load: stalled\n"); failed += open_connections; break; }
        for (int i = 0; i < ready; i++) {
            Connection *c = events[i].data.ptr;
            if (c->state == CONTENT && events[i].events & EPOLLOUT) send_content(c);
            if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) read_replies(c);
        }
        if (is_holding && held && held >= open_connections) { release(all); active_s = now_s(); }
    }
    double wall_s = now_s() - began_s;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    qsort(latency_s, accepted, sizeof *latency_s, by_value);
    if (*first_refusal) fprintf(stderr, "load: %ld refused, the first with: %s\n", refused, first_refusal);
    printf("{\"accepted\":%ld,\"refused\":%ld,\"failed\":%ld,\"number_sum\":%ld,\"content_bytes\":%ld,\"wall_s\":%.6f,\"cpu_s\":%.6f,"
           "\"p50_ms\":%.3f,\"p95_ms\":%.3f}\n", accepted, refused, failed, number_sum, accepted * size_bytes, wall_s,
           used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6,
           percentile_ms(50), percentile_ms(95));
    return 0;
}
