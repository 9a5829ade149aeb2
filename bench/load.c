/* load.c - the clients of every measured system: many connections at once, one message on each.
 *
 *   load -p PORT -s SIZE -c CONNECTIONS -n MESSAGES [-f FIRST] [-r RECIPIENTS] [-H]
 *   load -p PORT -i INDEX -d DATA -c CONNECTIONS -n MESSAGES [-f FIRST] [-a ADDRESS] [-R RATE] [-l LOG [-A]]
 *
 * Sends MESSAGES messages of SIZE bytes of content (without the dot's line), numbered from FIRST, to 127.0.0.1:PORT,
 * CONNECTIONS at a time, each on a connection of its own: banner, EHLO, MAIL RCPT DATA (in one write where PIPELINING is
 * offered), content, QUIT.  The recipients are rcptK@rcpt.example with K = number modulo RECIPIENTS, or, with 0, K = number:
 * each message a recipient that nobody asked for before.  The clients' addresses are spread over 127.0.1.1-100.
 *
 * -i, -d: the messages of a corpus in turn, with the field X-Bench-Number on top.  DATA holds them as they go over the wire,
 * dot-stuffed and with the dot's line; a line of INDEX is "OFFSET LENGTH HELO MAIL_FROM RCPT CLIENT_ADDRESS".
 * -a: the server's address, if not 127.0.0.1.
 * -R: RATE messages a second begin on average, at random intervals (exponential, always the same ones), as far as
 * CONNECTIONS suffice; without it each connection is followed by the next at once.
 * -l: a line "NUMBER WORD SECONDS" for the end of each attempt: the code of the last reply, or how the connection ended:
 * "refused" (there was none), "banner" (it broke before that), "before" or "after" the final dot was written; and when, on
 * CLOCK_MONOTONIC.  -A: who is not accepted comes again half a second later, as
 * mail servers do, until he is.
 *
 * -H: MESSAGES connections send all but the final dot; then "held N" is printed and a line on standard input awaited;
 * then all send their dot at once.
 *
 * Prints one line of JSON.  number_sum and content_bytes are of the accepted messages only: what the sink must have.
 * Latency is from connect() to the reply to the dot; dot_*: from writing the dot to its reply.  Exit code 0 whatever the server did, 1 when the load itself failed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define CLIENT_ADDRESSES 100
#define STALLED_S 60.0
#define AGAIN_S 0.5
#define DOT ".\r\n"
#define MARK "X-Bench-Number: %010ld\r\n"

typedef enum { BANNER, EHLO, MAIL, RCPT, DATA, CONTENT, ANSWER, QUIT, CLOSED } State;
typedef struct {
    int fd, is_refused, is_pipelining, refused; /* refused: the first reply to MAIL or RCPT that was not 2xx */
    State state;
    long number;
    double began_s, dot_s;
    size_t sent; /* bytes of head and body already written */
    size_t in_used, head_bytes, body_bytes;
    const char *body; /* ends in the dot's line */
    char in[4096], head[1024];
} Connection;
typedef struct {
    size_t offset, length;
    char helo[80], mail_from[120], rcpt[120];
    struct in_addr client;
} Entry;
typedef struct {
    long number;
    double due_s;
} Again;

static int poller, is_holding, at_once = 20;
static long port, size_bytes, messages, first, recipients = 100;
static long started, open_connections, held, accepted, refused, failed, number_sum, content_bytes;
static double *latency_s, *dot_latency_s;
static char *body; /* the same in every message that is not of a corpus; ends in the dot's line */
static size_t body_bytes;
static Entry *entries;
static long entry_count;
static const char *corpus;
static double rate, due_s;
static FILE *log_file;
static int is_persistent;
static Again *again; /* a ring */
static long again_first, again_last;
static struct in_addr server_address;
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
        MARK
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
    size_t head_bytes = write_head(head, sizeof head, 0);
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

static void read_corpus(const char *index, const char *data) {
    FILE *file = fopen(index, "r");
    int fd = open(data, O_RDONLY);
    struct stat about;
    Entry entry;
    char client[64];
    if (!file) die(index);
    if (fd < 0 || fstat(fd, &about)) die(data);
    while (fscanf(file, "%zu %zu %79s %119s %119s %63s", &entry.offset, &entry.length, entry.helo, entry.mail_from, entry.rcpt, client) == 6) {
        if (!inet_aton(client, &entry.client) || entry.length < sizeof DOT || entry.offset + entry.length > (size_t)about.st_size) break;
        if (!(entry_count & (entry_count - 1))) entries = realloc(entries, (entry_count ? 2 * entry_count : 1) * sizeof *entries);
        entries[entry_count++] = entry;
    }
    if (!feof(file) || !entry_count) { fprintf(stderr, "load: %s: line %ld means nothing\n", index, entry_count + 1); exit(1); }
    fclose(file);
    corpus = mmap(0, about.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (corpus == MAP_FAILED) die(data);
}

static const Entry *entry_of(const Connection *c) { return entry_count ? &entries[c->number % entry_count] : NULL; }

static size_t size_of(const Connection *c) { return c->head_bytes + c->body_bytes - (sizeof DOT - 1); }

static void want(Connection *c, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event)) die("load: epoll_ctl");
}

/* The number of the message that is due, if one is: who comes again goes first. */
static int is_due(long *number) {
    double now = now_s();
    if (again_first < again_last && again[again_first % messages].due_s <= now) {
        *number = again[again_first++ % messages].number;
        return 1;
    }
    if (started == messages || (rate > 0 && due_s > now)) return 0;
    if (rate > 0) due_s -= log(1 - drand48()) / rate;
    *number = first + started++;
    return 1;
}

/* One attempt is over; `word` says how. */
static void note(Connection *c, const char *word, int is_accepted) {
    if (log_file) fprintf(log_file, "%ld %s %.3f\n", c->number, word, now_s());
    if (!is_accepted && is_persistent) again[again_last++ % messages] = (Again){c->number, now_s() + AGAIN_S};
}

static void begin(Connection *c) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = server_address};
    struct sockaddr_in client = {.sin_family = AF_INET};
    int one = 1;
    c->state = CLOSED;
    if (!is_due(&c->number)) return;
    c->refused = c->is_refused = 0;
    c->sent = c->in_used = 0;
    c->began_s = now_s();
    c->state = BANNER;
    const Entry *entry = entry_of(c);
    c->body = entry ? corpus + entry->offset : body;
    c->body_bytes = entry ? entry->length : body_bytes;
    c->head_bytes = entry ? (size_t)snprintf(c->head, sizeof c->head, MARK, c->number) : write_head(c->head, sizeof c->head, c->number);
    client.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 0x100 + c->number % CLIENT_ADDRESSES); /* 127.0.1.1 and on */
    if (entry) client.sin_addr = entry->client;
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0) die("load: socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(c->fd, (void *)&client, sizeof client)) die("load: bind");
    if (connect(c->fd, (void *)&server, sizeof server) && errno != EINPROGRESS) die("load: connect");
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) die("load: epoll_ctl");
    open_connections++;
}

static void end(Connection *c) {
    if (c->state != QUIT) {
        failed++;
        note(c, c->is_refused ? "refused" : c->state == BANNER ? "banner" : c->state == ANSWER ? "after" : "before", 0);
    }
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
    char mail[200], rcpt[200], batch[500];
    long who = recipients ? c->number % recipients : c->number;
    const Entry *entry = entry_of(c);
    if (entry) {
        snprintf(mail, sizeof mail, "MAIL FROM:<%s>\r\n", entry->mail_from);
        snprintf(rcpt, sizeof rcpt, "RCPT TO:<%s>\r\n", entry->rcpt);
    } else {
        snprintf(mail, sizeof mail, "MAIL FROM:<sender%ld@example.org> SIZE=%ld\r\n", c->number % 1000, size_bytes);
        snprintf(rcpt, sizeof rcpt, "RCPT TO:<rcpt%ld@rcpt.example>\r\n", who);
    }
    if (c->is_pipelining) {
        if (c->state != EHLO) return; /* all was said at once */
        snprintf(batch, sizeof batch, "%s%sDATA\r\n", mail, rcpt);
        say(c, batch);
    } else {
        say(c, c->state == EHLO ? mail : c->state == MAIL ? rcpt : "DATA\r\n");
    }
}

static void send_content(Connection *c) {
    size_t total = c->head_bytes + c->body_bytes - (is_holding ? sizeof DOT - 1 : 0);
    while (c->sent < total) {
        struct iovec parts[2];
        int count = 0;
        if (c->sent < c->head_bytes) parts[count++] = (struct iovec){c->head + c->sent, c->head_bytes - c->sent};
        size_t skip = c->sent < c->head_bytes ? 0 : c->sent - c->head_bytes;
        parts[count++] = (struct iovec){(char *)c->body + skip, total - c->head_bytes - skip};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t written = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (written < 0 && errno == EAGAIN) { want(c, EPOLLIN | EPOLLOUT); return; }
        if (written < 0) { want(c, EPOLLIN); return; } /* the read that follows tells why */
        c->sent += written;
    }
    want(c, EPOLLIN);
    if (is_holding) held++;
    else c->state = ANSWER, c->dot_s = now_s();
}

static void judged(Connection *c, int code, const char *line) {
    char word[16];
    snprintf(word, sizeof word, "%d", code);
    note(c, word, code / 100 == 2);
    if (code / 100 == 2) {
        latency_s[accepted] = now_s() - c->began_s;
        dot_latency_s[accepted++] = now_s() - c->dot_s;
        number_sum += c->number;
        content_bytes += size_of(c);
    } else {
        refused++;
        if (!*first_refusal) snprintf(first_refusal, sizeof first_refusal, "%.*s", (int)strcspn(line, "\r\n"), line);
    }
    c->state = QUIT;
    say(c, "QUIT\r\n");
}

/* `code` is the last line of a reply. */
static void take_reply(Connection *c, int code, const char *line) {
    char hello[120];
    switch (c->state) {
    case BANNER:
        if (code != 220) { judged(c, code, line); break; }
        snprintf(hello, sizeof hello, "EHLO %s\r\n", entry_count ? entry_of(c)->helo : "client.example.org");
        say(c, hello);
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
    if (got <= 0) { c->is_refused = got < 0 && errno == ECONNREFUSED; end(c); return; }
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

static double percentile_ms(const double *sorted_s, int percent) {
    return accepted ? sorted_s[(accepted - 1) * percent / 100] * 1e3 : 0;
}

/* For how long epoll may wait: until the next message is due, or a second; so long, too, if no connection is free for it. */
static int patience_ms(void) {
    double next_s = now_s() + 1;
    if (open_connections == at_once) return 1000;
    if (rate > 0 && started < messages && due_s < next_s) next_s = due_s;
    if (again_first < again_last && again[again_first % messages].due_s < next_s) next_s = again[again_first % messages].due_s;
    double wait_s = next_s - now_s();
    return wait_s > 0 ? (int)ceil(wait_s * 1e3) : 0;
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
    const char *index = NULL, *data = NULL, *log_path = NULL;
    server_address.s_addr = htonl(INADDR_LOOPBACK);
    for (int option; (option = getopt(argc, argv, "p:s:c:n:f:r:Ha:i:d:R:l:A")) != -1;) switch (option) {
        case 'p': port = atol(optarg); break;
        case 's': size_bytes = atol(optarg); break;
        case 'c': at_once = atoi(optarg); break;
        case 'n': messages = atol(optarg); break;
        case 'f': first = atol(optarg); break;
        case 'r': recipients = atol(optarg); break;
        case 'H': is_holding = 1; break;
        case 'a': if (!inet_aton(optarg, &server_address)) return 2; break;
        case 'i': index = optarg; break;
        case 'd': data = optarg; break;
        case 'R': rate = atof(optarg); break;
        case 'l': log_path = optarg; break;
        case 'A': is_persistent = 1; break;
        default: return 2;
    }
    if (is_holding) at_once = messages;
    if (index && data) read_corpus(index, data);
    else make_body();
    if (log_path && !(log_file = fopen(log_path, "w"))) die(log_path);
    poller = epoll_create1(0);
    latency_s = calloc(messages + 1, sizeof *latency_s);
    dot_latency_s = calloc(messages + 1, sizeof *dot_latency_s);
    again = calloc(messages + 1, sizeof *again);
    Connection *all = calloc(at_once, sizeof *all);
    double began_s = now_s(), active_s = began_s;
    due_s = began_s;
    for (int i = 0; i < at_once; i++) begin(&all[i]);
    while (open_connections || started < messages || again_first < again_last) {
        struct epoll_event events[128];
        if (rate > 0 || is_persistent)
            for (int i = 0; i < at_once; i++) if (all[i].state == CLOSED) begin(&all[i]);
        int ready = epoll_wait(poller, events, 128, patience_ms());
        if (ready > 0 || !open_connections) active_s = now_s();
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
    if (log_file && fclose(log_file)) die(log_path);
    qsort(latency_s, accepted, sizeof *latency_s, by_value);
    qsort(dot_latency_s, accepted, sizeof *dot_latency_s, by_value);
    if (*first_refusal) fprintf(stderr, "load: %ld refused, the first with: %s\n", refused, first_refusal);
    printf("{\"accepted\":%ld,\"refused\":%ld,\"failed\":%ld,\"number_sum\":%ld,\"content_bytes\":%ld,\"wall_s\":%.6f,\"cpu_s\":%.6f,"
           "\"p50_ms\":%.3f,\"p95_ms\":%.3f,\"p99_ms\":%.3f,\"dot_p50_ms\":%.3f,\"dot_p95_ms\":%.3f,\"dot_p99_ms\":%.3f}\n",
           accepted, refused, failed, number_sum, content_bytes, wall_s,
           used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6,
           percentile_ms(latency_s, 50), percentile_ms(latency_s, 95), percentile_ms(latency_s, 99),
           percentile_ms(dot_latency_s, 50), percentile_ms(dot_latency_s, 95), percentile_ms(dot_latency_s, 99));
    return 0;
}
