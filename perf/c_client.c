// A minimal load-generating client in C, for comparison with the one in Python: the same work, nothing else.
//
//   c_client PORT STREAMS REQUESTS TOKENS OUT
//
// A closed loop: STREAMS connections, each sends its next request when its last one is done, REQUESTS in all. Every read
// takes the kernel's receive timestamp (recvmsg, SO_TIMESTAMPNS), appends the bytes to the connection's buffer and looks
// whether they end as a chunked SSE stream ends. At the end of a response its stamps go to OUT: int64 request, sent,
// number of reads, then a stamp (CLOCK_MONOTONIC ns) for each read.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define END "data: [DONE]\n\n\r\n0\r\n\r\n"

struct conn {
    int fd;
    long request;
    int64_t sent;
    char *buffer;
    size_t used, room;
    int64_t *stamps;
    int num_stamps, room_stamps;
};

static long next_request, num_requests, num_done, tokens;
static int64_t offset_ns;
static FILE *out;

static int64_t now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void send_next(struct conn *c) {
    if (next_request >= num_requests) return;
    char body[512], head[512];
    int n = snprintf(body, sizeof body,
                     "{\"prompt\":[300,301,302,303,304,305,306,307,308,309,310,311,312,313,314,315],\"model\":\"mock\","
                     "\"max_tokens\":%ld,\"stream\":true,\"stream_options\":{\"include_usage\":true}}", tokens);
    int h = snprintf(head, sizeof head,
                     "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                     "Content-Length: %d\r\nX-Request-Id: %ld\r\n\r\n", n, next_request);
    char all[1024];
    memcpy(all, head, h);
    memcpy(all + h, body, n);
    c->request = next_request++;
    c->used = 0;
    c->num_stamps = 0;
    c->sent = now(CLOCK_MONOTONIC);
    if (send(c->fd, all, h + n, 0) != h + n) { perror("send"); exit(1); }
}

static void finish(struct conn *c) {
    int64_t head[3] = {c->request, c->sent, c->num_stamps};
    fwrite(head, sizeof head, 1, out);
    fwrite(c->stamps, sizeof(int64_t), c->num_stamps, out);
    num_done++;
    send_next(c);
}

static void readable(struct conn *c) {
    if (c->room - c->used < 65536) {
        c->room = c->room ? 2 * c->room : 262144;
        c->buffer = realloc(c->buffer, c->room);
    }
    char control[CMSG_SPACE(sizeof(struct timespec))];
    struct iovec iov = {c->buffer + c->used, 65536};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(c->fd, &m, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) { fprintf(stderr, "connection lost\n"); exit(1); }
    int64_t stamp = 0;
    struct cmsghdr *cm = CMSG_FIRSTHDR(&m);
    if (cm && cm->cmsg_type == SCM_TIMESTAMPNS) {
        struct timespec t;
        memcpy(&t, CMSG_DATA(cm), sizeof t);
        stamp = t.tv_sec * 1000000000LL + t.tv_nsec - offset_ns;
    } else {
        stamp = now(CLOCK_MONOTONIC);
    }
    if (c->num_stamps == c->room_stamps) {
        c->room_stamps = c->room_stamps ? 2 * c->room_stamps : 256;
        c->stamps = realloc(c->stamps, c->room_stamps * sizeof(int64_t));
    }
    c->stamps[c->num_stamps++] = stamp;
    c->used += n;
    size_t end = sizeof END - 1;
    if (c->used >= end && memcmp(c->buffer + c->used - end, END, end) == 0) finish(c);
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    int port = atoi(argv[1]), streams = atoi(argv[2]);
    num_requests = atol(argv[3]);
    tokens = atol(argv[4]);
    out = fopen(argv[5], "wb");
    int64_t before = now(CLOCK_MONOTONIC), wall = now(CLOCK_REALTIME), after = now(CLOCK_MONOTONIC);
    offset_ns = wall - (before + after) / 2;
    int ep = epoll_create1(0);
    struct conn *conns = calloc(streams, sizeof *conns);
    for (int i = 0; i < streams; i++) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
        int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
        if (connect(fd, (struct sockaddr *)&a, sizeof a)) { perror("connect"); return 1; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one);
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        conns[i].fd = fd;
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &conns[i]};
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
    }
    for (int i = 0; i < streams; i++) send_next(&conns[i]);
    struct epoll_event events[1024];
    while (num_done < num_requests) {
        int n = epoll_wait(ep, events, 1024, -1);
        for (int i = 0; i < n; i++) readable(events[i].data.ptr);
    }
    fclose(out);
    return 0;
}
