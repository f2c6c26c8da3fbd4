// SPDX-License-Identifier: Apache-2.0
// A board in Verilator: the clock, and the UART pins of `board_top` as a pseudo-terminal.
//
//   board_sim CLOCK_HZ BAUD [SEED FAULTS_IN FAULTS_OUT]
//
// The first line on standard output is the name of the terminal that stands for the board's
// serial port. Time is the model's: a bit takes CLOCK_HZ clocks over the speed that the host has
// set on that terminal, so a host that sets another speed than the board's is misunderstood as it
// would be on a real line.
//
// FAULTS_IN and FAULTS_OUT are how many of a million bytes, to and from the board, are dropped,
// spoiled, repeated or held back; which ones follows from SEED.
//
// It runs until standard input ends. Then it writes one line on standard error: clocks, seconds,
// and faults.

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fcntl.h>
#include <memory>
#include <poll.h>
#include <string>
#include <termios.h>
#include <unistd.h>

#include "Vboard_top.h"
#include "verilated.h"

namespace {

constexpr uint64_t kPollClocks = 256;         // between looks at the terminal
constexpr uint64_t kParentClocks = 1 << 16;   // between looks at standard input
constexpr double kHeldBits = 3000;            // longest that a byte is held back, in bits

[[noreturn]] void die(const std::string &what) {
    std::fprintf(stderr, "board_sim: %s\n", what.c_str());
    std::exit(2);
}

double bits_per_second(speed_t speed) {
    static const struct { speed_t code; double value; } table[] = {
        {B9600, 9600}, {B19200, 19200}, {B38400, 38400}, {B57600, 57600}, {B115200, 115200},
        {B230400, 230400}, {B460800, 460800}, {B500000, 500000}, {B576000, 576000},
        {B921600, 921600}, {B1000000, 1000000}, {B1152000, 1152000}, {B1500000, 1500000},
        {B2000000, 2000000}, {B2500000, 2500000}, {B3000000, 3000000}, {B3500000, 3500000},
        {B4000000, 4000000},
    };
    for (const auto &entry : table)
        if (entry.code == speed) return entry.value;
    return 0;
}

speed_t code_of(double baud) {
    for (speed_t code : {B9600, B19200, B38400, B57600, B115200, B230400, B460800, B500000,
                         B576000, B921600, B1000000, B1152000, B1500000, B2000000, B2500000,
                         B3000000, B3500000, B4000000})
        if (bits_per_second(code) == baud) return code;
    die("BAUD is no speed that a terminal has");
}

// Marsaglia's xorshift64*.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u | 1) {}
    uint32_t below(uint32_t limit) {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(((state_ * 0x2545F4914F6CDD1Du) >> 32) * limit >> 32);
    }

  private:
    uint64_t state_;
};

// A line that may do harm to bytes. `pass` is given each byte, and calls `put(byte, held)` for
// what comes of it; `held` is how many bit times it waits before it goes on.
class Line {
  public:
    Line(uint64_t seed, uint32_t per_million) : random_(seed), rate_(per_million) {}
    template <typename Put> void pass(uint8_t byte, Put put) {
        double held = 0;
        if (rate_ && random_.below(1000000) < rate_) {
            ++faults;
            switch (random_.below(4)) {
            case 0: return;
            case 1: byte ^= 1u << random_.below(8); break;
            case 2: put(byte, held); break;
            default: held = random_.below(static_cast<uint32_t>(kHeldBits)); break;
            }
        }
        put(byte, held);
    }
    uint64_t faults = 0;

  private:
    Random random_;
    uint32_t rate_;
};

struct Pending {
    uint8_t byte;
    double held;   // bit times that it still waits
};

struct Sent {
    char byte;
    double at;     // clock from which on the host may see it
};

}  // namespace

int main(int argc, char **argv) {
    if (argc != 3 && argc != 6) die("usage: board_sim CLOCK_HZ BAUD [SEED FAULTS_IN FAULTS_OUT]");
    const double clock_hz = std::atof(argv[1]);
    const double own_baud = std::atof(argv[2]);
    if (clock_hz <= 0 || own_baud <= 0) die("CLOCK_HZ and BAUD must be more than 0");
    const uint64_t seed = argc == 6 ? std::strtoull(argv[3], nullptr, 0) : 0;
    Line to_board(seed, argc == 6 ? std::atoi(argv[4]) : 0);
    Line to_host(seed + 1, argc == 6 ? std::atoi(argv[5]) : 0);

    const int master = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK);
    if (master < 0 || grantpt(master) || unlockpt(master)) die("no pseudo-terminal to be had");
    const char *name = ptsname(master);
    // Kept open, so that the terminal outlives each host.
    const int slave = open(name, O_RDWR | O_NOCTTY);
    if (slave < 0) die("the pseudo-terminal cannot be opened");
    termios settings;
    tcgetattr(slave, &settings);
    cfmakeraw(&settings);
    cfsetspeed(&settings, code_of(own_baud));
    tcsetattr(slave, TCSANOW, &settings);
    std::printf("%s\n", name);
    std::fflush(stdout);

    VerilatedContext context;
    auto top = std::make_unique<Vboard_top>(&context);
    std::deque<Pending> incoming;
    std::deque<Sent> leaving;
    std::string outgoing;
    double bit = clock_hz / own_baud;

    top->rx = 1;
    top->rst = 1;
    auto clock = [&] {
        top->clk = 1;
        top->eval();
        top->clk = 0;
        top->eval();
    };
    for (int i = 0; i < 8; ++i) clock();
    top->rst = 0;

    // To the board: the frame on the wire is start bit, byte, stop bit; `send_at` is its next edge.
    uint32_t send_frame = 0;
    int send_left = 0;
    double send_at = 0;
    // From the board: -1 while the line is idle, else the bits that have been sampled.
    int take_bits = -1;
    uint32_t take_frame = 0;
    double take_at = 0;

    const auto began = std::chrono::steady_clock::now();
    uint64_t now = 0;
    for (bool running = true; running; ++now) {
        clock();
        const double time = static_cast<double>(now);

        if (send_left && time >= send_at && --send_left) {
            send_frame >>= 1;
            top->rx = send_frame & 1;
            send_at += bit;
        }
        if (!send_left && !incoming.empty()) {
            Pending &next = incoming.front();
            if (next.held > 0) {
                next.held -= 1 / bit;
            } else {
                send_frame = 0x200u | static_cast<uint32_t>(next.byte) << 1;
                send_left = 10;
                top->rx = 0;
                send_at = time + bit;
                incoming.pop_front();
            }
        }

        if (take_bits < 0) {
            if (!top->tx) {
                take_bits = 0;
                take_frame = 0;
                take_at = time + 1.5 * bit;
            }
        } else if (time >= take_at) {
            if (take_bits < 8) {
                take_frame |= static_cast<uint32_t>(top->tx & 1) << take_bits++;
                take_at += bit;
            } else {
                take_bits = -1;
                // Without a stop bit there is a byte all the same, as with most receivers.
                to_host.pass(static_cast<uint8_t>(take_frame), [&](uint8_t byte, double held) {
                    const double earliest = leaving.empty() ? time : leaving.back().at;
                    leaving.push_back({static_cast<char>(byte),
                                       std::max(earliest, time + held * bit)});
                });
            }
        }

        if (now % kPollClocks == 0) {
            if (tcgetattr(master, &settings) == 0) {
                const double set = bits_per_second(cfgetospeed(&settings));
                if (set > 0) bit = clock_hz / set;
            }
            uint8_t buffer[4096];
            const ssize_t got = incoming.size() < sizeof buffer
                                    ? read(master, buffer, sizeof buffer) : 0;
            for (ssize_t i = 0; i < got; ++i)
                to_board.pass(buffer[i], [&](uint8_t byte, double held) {
                    incoming.push_back({byte, held});
                });
            for (; !leaving.empty() && leaving.front().at <= time; leaving.pop_front())
                outgoing.push_back(leaving.front().byte);
            if (!outgoing.empty()) {
                const ssize_t put = write(master, outgoing.data(), outgoing.size());
                if (put > 0) outgoing.erase(0, static_cast<size_t>(put));
                else if (put < 0 && errno != EAGAIN) die("the pseudo-terminal is gone");
            }
        }
        if (now % kParentClocks == 0) {
            pollfd parent{STDIN_FILENO, POLLIN, 0};
            char ignored[64];
            if (poll(&parent, 1, 0) > 0 && read(STDIN_FILENO, ignored, sizeof ignored) <= 0)
                running = false;
        }
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    std::fprintf(stderr, "clocks %llu seconds %.3f faults_in %llu faults_out %llu\n",
                 static_cast<unsigned long long>(now), took.count(),
                 static_cast<unsigned long long>(to_board.faults),
                 static_cast<unsigned long long>(to_host.faults));
    top->final();
    return 0;
}
